"""All commands of ``python -m qtale_lightning``. What a command imports, it imports when it runs."""

from qtale_lightning.commands import stages, sweeps, tables, training
from qtale_lightning.commands.parser import Command, Group
from qtale_lightning.options import of_training

_RUN = "outputs/smollm2-135m-qtale-csqa-s0"
_FILES = (
    "--config experiments/base.yaml --config experiments/models/tiny.yaml "
    "--config experiments/methods/qtale.yaml --data.tasks facts"
)
_TABLE = "csqa --model smollm2-135m --data.tasks csqa --seeds 0,1"


def _quantizing(name: str) -> bool:
    return name.startswith("quantize.")


def _choosing(name: str) -> bool:
    return name.startswith("sweep.")


COMMANDS = Group(
    "QTALE: token-adaptive layer execution that survives weight quantization.",
    {
        "fit": Command(training.fit, _FILES, "the run's", of_training, goes_on=True),
        "plan": Command(training.plan, _FILES, "the run's", of_training),
        "quantize": Command(
            stages.quantize, f"{_RUN} --quantize.bits 4,3.5,2", "the run's", _quantizing, goes_on=True
        ),
        "thresholds": Command(
            stages.thresholds,
            f"{_RUN} --sweep.rule budget --sweep.budgets 0.7,0.8",
            "the run's",
            _choosing,
            goes_on=True,
        ),
        "evaluate": Command(stages.evaluate, f"{_RUN} --bits 4 --theta 0.3", "the run's"),
        "lm-eval": Command(stages.lm_eval, f"{_RUN} --tasks arc_easy,piqa --bits 4", "the run's"),
        "inspect": Command(stages.inspect, f"{_RUN} --bits 4,3 --theta 0.3", "the run's"),
        "report": Command(stages.report, _RUN),
        "compare": Command(stages.compare, f"{_RUN} outputs/smollm2-135m-full-csqa-s0 --to outputs/compared"),
        "table": Command(tables.table, f"{_TABLE} --plan", "the run's", goes_on=True),
        "figures": Command(tables.figures, _TABLE, "the run's"),
        "sweep": Group(
            "W&B sweeps over runs, with and without its server (θ of one run: `thresholds`)",
            {
                "start": Command(
                    sweeps.start, "sweeps/lambda2.yaml --local --jobs 2", "behind --", goes_on=True
                ),
                "join": Command(sweeps.join, "entity/project/id --count 4", goes_on=True),
                "trial": Command(
                    sweeps.trial,
                    "--to=outputs/sweeps/bits quantize,thresholds RUN -- --quantize.bits=[3]",
                    "all",
                    goes_on=True,
                ),
                "table": Command(sweeps.table, "outputs/sweeps/lambda2-smollm2-135m-csqa-s0"),
            },
        ),
        "doctor": Command(training.doctor, "--model smollm2-135m --data.root data/csqa", "the run's"),
    },
)
