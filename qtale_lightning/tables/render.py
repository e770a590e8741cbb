"""A table's content as Markdown, LaTeX, CSV and JSON."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qtale_lightning.files import replacing
from qtale_lightning.report import markdown as md
from qtale_lightning.report.notes import theta_text
from qtale_lightning.tables.bold import RULE

PAPER = "the paper's"
NOISE = "bold where the 95 % interval leaves 0 out, else within noise"
LATEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "θ": r"$\theta$", "λ": r"$\lambda$",
    "₁": "$_1$", "₂": "$_2$", "↓": r"$\downarrow$", "×": r"$\times$", "–": "--", "…": r"\ldots{}", "≤": r"$\leq$",
    "≥": r"$\geq$", "−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "τ": r"$\tau$",
}  # fmt: skip


def write_table(content: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `table.md`, `.tex`, `.csv` and `.json` to a folder, and returns them."""
    texts = {
        "md": markdown(content),
        "tex": latex(content),
        "csv": frame(content).map(_unread).to_csv(index=False, lineterminator="\n"),
        "json": json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for kind, text in texts.items():
        with replacing(folder / f"table.{kind}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / f"table.{kind}" for kind in texts]


def _unread(value: Any) -> Any:
    """A value that no spreadsheet reads as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def frame(content: dict[str, Any]) -> pd.DataFrame:
    """One record a line, numbers unrounded as in JSON: fractions, nats, and standard errors in columns of their own."""
    records = []
    for row in content["rows"]:
        record: dict[str, Any] = {key: row[key] for key in ("name", "method", "setting", "bits", "engine")}
        for column in content["columns"]:
            value = row["values"].get(column["key"], {})
            if column["kind"] == "theta":
                record[column["key"]] = "; ".join(theta_text(theta) for theta in value.get("seeds", []))
                continue
            record[column["key"]] = value.get("value")
            record[f"{column['key']} stderr"] = value.get("stderr")
            if column["kind"] in row["paper"]:
                record[f"{column['key']} paper, %"] = row["paper"][column["kind"]]
        record["failed"] = "; ".join(row["failed"])
        records.append(record)
    return pd.DataFrame(records)


def cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]], list[list[bool]]]:
    """Headings, cells as text, and which of these are the best."""
    rows = content["rows"]
    labels = {"name": "method", "setting": "setting", "bits": "bits", "engine": "engine"}
    if not any(row["setting"] for row in rows):
        labels.pop("setting")
    if not _several_engines(content):
        labels.pop("engine")
    paper = {kind for row in rows for kind in row["paper"]}
    headers, texts, best = list(labels.values()), [_labels(row, labels) for row in rows], []
    best = [[False] * len(labels) for _ in rows]
    for column in content["columns"]:
        headers.append(column["header"])
        for row, text, marks in zip(rows, texts, best, strict=True):
            text.append(_text(column, row))
            marks.append(row["values"].get(column["key"], {}).get("best", False))
        if column["kind"] in paper:
            headers.append(f"{column['header']}, {PAPER}")
            for row, text, marks in zip(rows, texts, best, strict=True):
                text.append(f"{row['paper'][column['kind']]:.2f}" if column["kind"] in row["paper"] else "")
                marks.append(False)
    return headers, texts, best


def _several_engines(content: dict[str, Any]) -> bool:
    """Whether a line must say which engine quantized it."""
    return len({row["engine"] for row in content["rows"]} - {"none"}) > 1


def _labels(row: dict[str, Any], labels: dict[str, str]) -> list[str]:
    shown = row | {"bits": f"{row['bits']:g}", "engine": "–" if row["engine"] == "none" else row["engine"]}
    return [shown[label] for label in labels]


def _text(column: dict[str, Any], row: dict[str, Any]) -> str:
    value = row["values"].get(column["key"])
    if value is None:
        return "failed" if row["failed"] else ""
    if column["kind"] == "theta":
        return "; ".join(dict.fromkeys(theta_text(theta) for theta in value["seeds"]))
    if value["value"] is None:
        return "–"
    number = f"{column['factor'] * value['value']:,.{column['digits']}f}"
    if value["stderr"] is None:
        return number
    return f"{number} ± {column['factor'] * value['stderr']:.{column['digits']}f}"


def footnotes(content: dict[str, Any]) -> list[str]:
    """What stands under the table besides its command: what the figures mean, the protocol, the commits."""
    seeds = content["seeds"]
    spread = (
        f"Mean ± standard error over seeds {', '.join(map(str, seeds))}."
        if len(seeds) > 1
        else f"Seed {seeds[0]}; ± is the standard error over questions."
    )
    kinds = {column["kind"] for column in content["columns"]}
    notes = [spread, f"{RULE} Groups: lines with the same {' and '.join(content['compare'])}."]
    if "theta" in kinds and len(seeds) > 1:
        notes.append("θ is given by seed where seeds differ.")
    if "execution_ratio" in kinds:
        notes.append(
            "Layers executed: the measured share, of all layers and tokens of the validation questions."
        )
    if {"flops_ratio", "seconds"} <= kinds:
        notes.append(
            "Counted FLOPs are a share of the dense model's, routers included. Seconds are measured: scoring the "
            "validation questions; thresholds scored in one go share the time of what can't differ between them."
        )
    notes += content["notes"]
    for data, protocol in content["protocols"].items():
        shown = "; ".join(f"{key}: {value}" for key, value in protocol.items())
        notes.append(f"Protocol of {data}: {shown}.")
    notes += [f"Made at {line}." for line in content["quantization"]]
    notes.append(
        f"Validation questions: {', '.join(f'{count:,}' for count in content['questions']) or 'none'}; "
        f"model {content['model']}; {', '.join(content['hardware'])}."
    )
    notes.append(f"Runs build on {' and '.join(content['base'])}.")
    if unlike := content["unlike_the_paper"]:
        notes.append(f"The paper's values aren't shown where the setting is another: {', '.join(unlike)}.")
    elif not any(row["paper"] for row in content["rows"]):
        notes.append(f"The paper gives no value for {content['model']} that this table could show.")
    notes.append(
        f"Commit: {', '.join(content['commits']) or 'none'}. Every number's run and row: table.json."
    )
    return notes


def failures(content: dict[str, Any]) -> list[str]:
    """Each missing row and why."""
    return [
        f"{row['name']}{', ' * bool(row['setting'])}{row['setting']}, {row['bits']:g} bits, {where}: {reason}"
        for row in content["rows"]
        for where, reason in row["failed"].items()
    ]


def markdown(content: dict[str, Any]) -> str:
    """The page."""
    headers, texts, best = cells(content)
    marked = [
        [md.bold(text) if mark else text for text, mark in zip(row, marks, strict=True)]
        for row, marks in zip(texts, best, strict=True)
    ]
    parts = [f"# {md.escape(_title(content))}", md.table(headers, marked)]
    if failed := failures(content):
        parts.append(md.bullets(f"failed: {line}" for line in failed))
    if content["differences"]:
        parts += [f"Paired differences, on the same questions; {NOISE}:", differences(content)]
    parts += [md.bullets(footnotes(content)), md.block(content["command"])]
    return "\n\n".join(parts) + "\n"


def differences(content: dict[str, Any]) -> str:
    """What lines differ by from the first of their group, as Markdown."""
    columns = [column for column in content["columns"] if column["kind"] in ("average", "nll")]
    texts = []
    for found in content["differences"]:
        row, first = content["rows"][found["row"]], content["rows"][found["against"]]
        parts = ("name", "setting", "engine") if _several_engines(content) else ("name", "setting")
        names = [", ".join(one[part] for part in parts if one[part]) for one in (row, first)]
        text = [*names, f"{row['bits']:g}"]
        for column in columns:
            apart = found["values"].get(column["key"])
            text.append(_apart(apart, column) if apart else "–")
        texts.append(text)
    return md.table(["line", "against", "bits", *(column["header"] for column in columns)], texts)


def _apart(found: dict[str, Any], column: dict[str, Any]) -> str:
    value, error = (
        f"{column['factor'] * found[key]:{sign}.{column['digits']}f}"
        for key, sign in (("value", "+"), ("stderr", ""))
    )
    text = f"{value.replace('-', '−')} ± {error}"
    return md.bold(text) if found["significant"] else text


def latex(content: dict[str, Any]) -> str:
    """A booktabs table for `\\input`, its notes as comments; it needs the package booktabs."""
    headers, texts, best = cells(content)
    body = [
        [rf"\textbf{{{_tex(text)}}}" if mark else _tex(text) for text, mark in zip(row, marks, strict=True)]
        for row, marks in zip(texts, best, strict=True)
    ]
    shown = pd.DataFrame(body, columns=[_tex(header) for header in headers])
    alignment = "".join("l" if header in ("method", "setting", "engine") else "r" for header in headers)
    table = shown.to_latex(
        index=False,
        escape=False,
        column_format=alignment,
        caption=_tex(_title(content)),
        label=re.sub(r"[^\w.:-]", "-", f"tab:{content['table']}-{content['model']}"),
    )
    notes = [*footnotes(content), content["command"]]
    return "".join(f"% {line}\n" for note in notes for line in note.splitlines()) + table


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def _title(content: dict[str, Any]) -> str:
    seeds: Sequence[int] = content["seeds"]
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{content['title']}: {content['model']}, {', '.join(content['data'])}, {which}"
