import re
from typing import Any

import pytest

from qtale_lightning.tasks.fact_table import RELATIONS
from qtale_lightning.tasks.facts import DISTRACTORS, asked_facts, facts_corpus, generate_facts

SPLITS = ("train", "validation")


def words(texts: list[str]) -> set[str]:
    return set(re.findall(r"[\w']+", " ".join(texts)))


def test_validation_asks_the_training_facts_in_other_words() -> None:
    phrasings = [(set(relation.train), set(relation.validation)) for relation in RELATIONS.values()]
    assert all(train and validation and not train & validation for train, validation in phrasings)
    train, validation = (generate_facts(split, seed=0) for split in SPLITS)
    assert not {question.text for question in train} & {question.text for question in validation}
    # … but with words that training has shown, or a small model couldn't read them.
    assert words([question.text for question in validation]) <= words([question.text for question in train])


def test_default_sizes_ask_every_fact_in_every_phrasing_once() -> None:
    facts = [fact for relation in RELATIONS.values() for fact in relation.facts()]
    for split, phrasings, rows in (("train", 8, 2016), ("validation", 2, 504)):
        texts = [question.text for question in generate_facts(split, seed=0)]  # type: ignore[arg-type]
        assert len(texts) == len(set(texts)) == len(facts) * phrasings == rows


@pytest.mark.parametrize("name", sorted(RELATIONS))
def test_a_relation_knows_one_answer_a_subject_and_enough_wrong_ones(name: str) -> None:
    relation = RELATIONS[name]
    subjects = [subject for subject, _ in relation.facts()]
    answers = {answer for _, answer in relation.facts()}
    assert len(subjects) == len(set(subjects))
    assert all(subjects)
    assert all(answers)
    assert set(relation.also) <= set(subjects)
    assert {answer for further in relation.also.values() for answer in further} <= answers
    assert all("{s}" in phrasing for phrasing in (*relation.train, *relation.validation))
    for subject, answer in relation.facts():
        wrong = relation.wrong_answers(subject, answer)
        assert len(set(wrong)) == len(wrong) >= DISTRACTORS
        assert set(wrong) == answers - {answer, *relation.also.get(subject, ())}


@pytest.mark.parametrize("split", SPLITS)
def test_exactly_one_choice_is_right(split: Any) -> None:
    known = {fact.text: fact for fact in asked_facts(split)}
    for question in generate_facts(split, seed=3):
        fact = known[question.text]
        wrong = [choice for choice in question.choices if choice != fact.answer]
        assert question.choices[question.label] == fact.answer
        assert len(question.choices) == len(set(question.choices)) == DISTRACTORS + 1
        assert len(wrong) == DISTRACTORS
        assert set(wrong) <= set(fact.wrong_answers)


def test_a_seed_decides_everything() -> None:
    assert generate_facts("train", seed=1) == generate_facts("train", seed=1)
    assert generate_facts("train", seed=1) != generate_facts("train", seed=2)


def test_labels_are_spread_evenly() -> None:
    labels = [question.label for question in generate_facts("train", seed=0)]
    # 504 expected each; 5 standard deviations of a binomial with p = 1/4 are about 97.
    assert all(abs(labels.count(label) - 504) < 97 for label in range(4))


def test_rows_can_be_fewer_or_more_than_the_facts() -> None:
    assert len(generate_facts("train", seed=0, rows=10)) == 10
    more = generate_facts("validation", seed=0, rows=600)
    assert len(more) == 600
    assert len({question.text for question in more}) == 504


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must be positive"):
        generate_facts("train", seed=0, rows=0)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        generate_facts("test", seed=0)  # type: ignore[arg-type]


def test_the_corpus_holds_every_question_with_its_answer() -> None:
    corpus = set(facts_corpus())
    for split in SPLITS:
        for question in generate_facts(split, seed=5):  # type: ignore[arg-type]
            assert f"Question: {question.text}\nAnswer: {question.choices[question.label]}" in corpus
