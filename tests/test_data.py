"""Data in: every format is recognised, every bad row named, and the splits end up disjoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid.errors import BadRequest, DataError
from hybrid.training.data import read_dataset
from hybrid.training.recipes import Recipe, load_recipe, parse_sets


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def task(folder: Path, *, train: list, dev: list | None = None, test: list | None = None, **about) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"name": "t", "instruction": "Say it.", **about}))
    for split, rows in (("train", train), ("dev", dev), ("test", test)):
        if rows is not None:
            write(folder / f"{split}.jsonl", rows)
    return folder


def row(n: int | str, answer: str = "yes") -> dict:
    return {"id": f"r{n}", "input": f"question {n}", "reference": answer, "meta": {}}


ROWS = [row(n) for n in range(40)]

FORMATS = {
    "chat": [{"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]}
             for n in range(20)],
    "sharegpt": [{"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "a"}]}
                 for n in range(20)],
    "completion": [{"prompt": f"q {n}", "completion": "a"} for n in range(20)],
    "completion as turns": [{"prompt": [{"role": "user", "content": f"q {n}"}],
                             "completion": [{"role": "assistant", "content": "a"}]} for n in range(20)],
    "alpaca": [{"instruction": f"q {n}", "input": "", "output": "a"} for n in range(20)],
    "task rows": [{"input": f"q {n}", "reference": "a"} for n in range(20)],
    "labelled texts": [{"text": f"q {n}", "label": "a"} for n in range(20)],
}  # fmt: skip


@pytest.mark.parametrize("shape", FORMATS)
def test_a_format_is_found_by_looking(tmp_path: Path, shape: str) -> None:
    data = read_dataset(write(tmp_path / "rows.jsonl", FORMATS[shape]))
    examples = [*data.train, *data.dev]
    assert sorted(e.question for e in examples) == sorted(f"q {n}" for n in range(20))
    assert {e.answer for e in examples} == {"a"}
    assert (len(data.train), len(data.dev)) == (18, 2)
    assert data.name == "rows"


def turns(*texts: str, first: str = "user") -> list[dict]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


PAIRS = {
    "text": lambda n: {"prompt": f"q {n}", "chosen": "good", "rejected": "bad"},
    "a task row": lambda n: {"input": f"q {n}", "chosen": "good", "rejected": "bad"},
    "messages": lambda n: {"messages": turns(f"q {n}"), "chosen": "good", "rejected": "bad"},
    "TRL's turns": lambda n: {"prompt": turns(f"q {n}"), "chosen": turns("good", first="assistant"),
                              "rejected": turns("bad", first="assistant")},
    "TRL's implicit prompt": lambda n: {"chosen": turns(f"q {n}", "good"), "rejected": turns(f"q {n}", "bad")},
    "OpenAI": lambda n: {"input": {"messages": turns(f"q {n}"), "tools": []},
                         "preferred_output": turns("good", first="assistant"),
                         "non_preferred_output": turns("bad", first="assistant")},
}  # fmt: skip


@pytest.mark.parametrize("shape", PAIRS)
def test_preference_pairs_are_found_by_looking_and_teach_the_chosen_answer_too(tmp_path: Path, shape: str) -> None:
    rows = [{**PAIRS[shape](n), "meta": {"group": n}} for n in range(20)]
    data = read_dataset(write(tmp_path / "pairs.jsonl", rows))
    assert data.kind == "preference"
    assert (len(data.pairs), len(data.dev_pairs), len(data.texts)) == (18, 2, 0)
    assert {(p.messages[-1].text[:2], p.chosen, p.rejected) for p in data.pairs} == {("q ", "good", "bad")}
    assert sorted(p.meta["group"] for p in (*data.pairs, *data.dev_pairs)) == list(range(20))
    assert [e.answer for e in data.train] == ["good"] * 18
    assert [e.question for e in data.dev] == [p.messages[-1].text for p in data.dev_pairs]


def test_plain_text_rows_are_texts(tmp_path: Path) -> None:
    data = read_dataset(write(tmp_path / "t.jsonl", [{"text": f"Once upon a time, {n}."} for n in range(20)]))
    assert (data.kind, len(data.texts), len(data.dev_texts), data.train) == ("text", 18, 2, ())
    changed = read_dataset(write(tmp_path / "t.jsonl", [{"text": f"Once upon a day, {n}."} for n in range(20)]))
    assert data.train_sha256 != changed.train_sha256


def test_documents_are_cut_into_texts_and_none_stands_on_both_sides(tmp_path: Path) -> None:
    words = [f"Sentence {n} of a long text about nothing much." for n in range(200)]
    for name in "abcdefghijkl":
        (tmp_path / f"{name}.md").write_text(f"# Document {name}\n\n" + "\n\n".join(f"{name}: {w}" for w in words))
    (tmp_path / "picture.png").write_bytes(b"no text")
    with pytest.raises(DataError, match=r"picture.png: files of type .png are not read"):
        read_dataset(tmp_path)
    (tmp_path / "picture.png").unlink()
    data = read_dataset(tmp_path)
    train, dev = ({t.meta["group"] for t in texts} for texts in (data.texts, data.dev_texts))
    assert data.kind == "text"
    assert len(data.texts) > len(train) > 1
    assert dev
    assert not train & dev
    assert max(len(t.text) for t in data.texts) < 4 * 1024
    one = read_dataset(tmp_path / "a.md")
    assert one.texts
    assert one.dev_texts


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": f"{n} + 1", "output": str(n + 1)} for n in range(20)]))
    assert "Add.\n\n3 + 1" in {e.question for e in read_dataset(path).train}


def test_a_conversation_teaches_every_turn_that_has_weight(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "a?"), ("assistant", "A"), ("user", "b?"), ("assistant", "B")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    muted = {"messages": [{**m, "weight": 0} if m["content"] == "A" else m for m in chat["messages"][1:]]}
    data = read_dataset(write(tmp_path / "c.jsonl", [chat, muted]))
    answers = {(len(e.messages), e.answer) for e in (*data.train, *data.dev)}
    assert answers == {(2, "A"), (4, "B"), (3, "B")}


def test_the_user_message_of_a_task_is_instruction_blank_line_input(tmp_path: Path) -> None:
    data = read_dataset(task(tmp_path / "t", train=ROWS, dev=[row("d")]))
    assert data.train[0].question == "Say it.\n\nquestion 0"
    assert data.train[0].bare == "question 0"
    assert [e.id for e in data.dev] == ["rd"]


def test_duplicates_and_leaks_are_left_out_with_a_count(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", train=[*ROWS, ROWS[0], ROWS[0], row(1, "no")], dev=[row(2)], test=[row(3)])
    data = read_dataset(folder)
    assert (data.counts.duplicates, data.counts.leaked) == (2, 2)
    questions = [e.bare for e in data.train]
    assert "question 2" not in questions
    assert "question 3" not in questions
    assert questions.count("question 1") == 2, "the same question with another answer is no duplicate"


def test_a_missing_dev_split_is_drawn_with_the_seed_and_by_question(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", train=[*ROWS, *(row(n, "no") for n in range(40))])
    first, again, other = (read_dataset(folder, seed=s) for s in (0, 0, 1))
    assert first.dev_sha256 == again.dev_sha256 != other.dev_sha256
    assert len(first.dev) == 8
    assert not {e.key for e in first.train} & {e.key for e in first.dev}
    large = read_dataset(task(tmp_path / "l", train=[row(n) for n in range(6000)]))
    assert len(large.dev) == 500


ASKED = "could you please tell me how long a transfer to another bank usually takes before it arrives there"
NEAR = {
    "case and punctuation": (ASKED.capitalize() + "?", "yes", True),
    "one word in many": (ASKED + " " + ASKED.replace("arrives", "gets"), "yes", False),
    "another number": (ASKED + " if I send 50", "yes", False),
    "another answer": (ASKED.capitalize() + "?", "no", False),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_duplicates_are_left_out_and_named_unless_they_teach_something(tmp_path: Path, case: str) -> None:
    text, answer, near = NEAR[case]
    first = ASKED + (" if I send 40" if "send" in text else "")
    rows = [{"input": first, "reference": "yes"}, *ROWS, {"input": text, "reference": answer}]
    data = read_dataset(task(tmp_path / "t", train=rows, dev=[row("d")]))
    assert data.counts.near_duplicates == near
    assert data.counts.removed == (("train.jsonl, line 42: says almost the same as train.jsonl, line 1.",) * near)
    assert len(data.train) == 42 - near


def test_rows_from_a_template_are_no_near_duplicates(tmp_path: Path) -> None:
    rows = [{"input": f"{ASKED} {ASKED} from {'abcdefghij'[n % 10] * 3}", "reference": "yes"} for n in range(10)]
    data = read_dataset(write(tmp_path / "rows.jsonl", [*rows, *ROWS[:20]]))
    assert (len(data.train) + len(data.dev), data.counts.near_duplicates, data.counts.leaked) == (30, 0, 0)


def test_the_same_words_in_another_conversation_are_no_duplicate(tmp_path: Path) -> None:
    chats = [{"messages": turns(f"May I have {thing}?", "Are you sure?", "Yes, I am very sure about it!", "Fine.")}
             for thing in ("tea", "milk", "rum", "gin", "ale")]  # fmt: skip
    muted = [{"messages": [{**m, "weight": int(m["content"] == "Fine.")} for m in c["messages"]]} for c in chats]
    data = read_dataset(write(tmp_path / "c.jsonl", muted))
    assert (len(data.train) + len(data.dev), data.counts.near_duplicates) == (5, 0)


def test_a_training_row_that_almost_equals_a_test_row_is_left_out_and_named(tmp_path: Path) -> None:
    test = [{"input": ASKED, "reference": "yes"}, row(3)]
    rows = [*ROWS, {"input": ASKED.upper(), "reference": "yes"}]
    data = read_dataset(task(tmp_path / "t", train=rows, dev=[row("d")], test=test))
    assert data.counts.leaked == 2
    assert set(data.counts.removed) == {
        "train.jsonl, line 41: is also test.jsonl, line 1.", "train.jsonl, line 4: is also test.jsonl, line 2."
    }  # fmt: skip
    assert not {e.bare for e in data.train} & {"question 3", ASKED.upper()}


def test_splits_that_leak_more_than_five_percent_are_refused_with_the_lines_and_the_remedy(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", train=ROWS, dev=[row("d")], test=[row(n) for n in (3, 5, 7)])
    told = r"3 of 40 training rows stand in the dev or test split(.|\n)*hybrid data split(.|\n)*train.jsonl, line 4: is"
    with pytest.raises(DataError, match=told):
        read_dataset(folder)


def test_a_drawn_dev_split_gives_every_label_its_share(tmp_path: Path) -> None:
    labels = ["a"] * 400 + ["b"] * 100 + ["c"] * 20 + ["rare"]
    rows = [{"input": f"{n} {label * n}", "reference": label} for n, label in enumerate(labels)]
    data = read_dataset(write(tmp_path / "rows.jsonl", rows))
    assert [sum(e.answer == label for e in data.dev) for label in ("a", "b", "c", "rare")] == [40, 10, 2, 0]


def test_rows_of_a_group_are_never_parted(tmp_path: Path) -> None:
    rows = [{**row(n, str(n % 3)), "meta": {"group": n // 5, "table": n // 20}} for n in range(100)]
    path = write(tmp_path / "rows.jsonl", rows)
    for key, named in (("group", ""), ("table", "table")):
        data = read_dataset(path, group=named)
        train, dev = ({e.meta[key] for e in split} for split in (data.train, data.dev))
        assert dev
        assert not train & dev
    folder = task(tmp_path / "t", train=rows, group="table")
    assert read_dataset(folder).dev_sha256 == read_dataset(folder, group="table").dev_sha256


BAD = {
    "no JSON": ("{oops", "no JSON"),
    "an array": ([1], "write one JSON object a line"),
    "unknown keys": ({"question": "q", "answer": "a"}, "use one of: chosen + rejected, "),
    "empty answer": ({"input": "q", "reference": "  "}, "'reference': is empty"),
    "number as input": ({"input": 3, "reference": "a"}, "'input': is int"),
    "no assistant": ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
    "unknown role": ({"messages": [{"role": "robot", "content": "q"}]}, "'messages[0].role': is 'robot'"),
    "tool call": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]},
                  "'messages[1].content'"),
    "answer to nothing": ({"messages": [{"role": "assistant", "content": "a"}]}, "answers nothing"),
    "meta that is none": ({"input": "q", "reference": "yes", "meta": "m"}, "'meta': is str"),
    "equal preference": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'rejected': equals 'chosen'"),
    "preference without a question": ({"chosen": "a", "rejected": "b"}, "'chosen': answers nothing"),
    "preference without an answer": ({"chosen": turns("q"), "rejected": turns("q", "a")}, "end with an assistant"),
    "preferences in two conversations": ({"chosen": turns("q", "a"), "rejected": turns("p", "b")}, "another conv"),
    "OpenAI preference without turns": ({"input": "q", "preferred_output": [], "non_preferred_output": []},
                                        "'input': is no object"),
    "another kind": ({"text": "Once upon a time."}, "is a text row among chat rows"),
    "unlisted label": ({"input": "q", "reference": "maybe"}, "not among the labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_line_field_and_remedy(tmp_path: Path, case: str) -> None:
    bad, told = BAD[case]
    rows = [*ROWS[:7], bad, *ROWS[7:]]
    data = read_dataset(task(tmp_path / "t", train=rows, labels=["yes", "no"]))
    (complaint,) = data.counts.complaints
    assert complaint.startswith("train.jsonl, line 8, field ")
    assert told in complaint
    assert data.counts.wire() == {"rows": 41, "bad": 1, "duplicates": 0, "near_duplicates": 0, "leaked": 0}


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", train=ROWS)
    path = folder / "train.jsonl"
    path.write_bytes(path.read_bytes() + b'{"input": "\xff", "reference": "a"}\n')
    assert read_dataset(folder).counts.bad == 1


def test_more_than_five_percent_bad_rows_fail_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 of 43 rows cannot be used(.|\n)*train.jsonl, line 41"):
        read_dataset(task(tmp_path / "t", train=[*ROWS, "{", "{", "{"]))


@pytest.mark.parametrize(("make", "told"), [
    (lambda p: p / "nowhere", "does not exist"),
    (lambda p: p, "holds no train.jsonl"),
    (lambda p: write(p / "empty.jsonl", []), "hold no rows"),
    (lambda p: write(p / "one.jsonl", [row(1)]), "fewer than two"),
    (lambda p: write(p / "x.parquet", [row(1)]), "no data file"),
    (lambda p: task(p / "t", train=[row(1)], dev=[row(1)]), "leaves no training row"),
    (lambda p: write(p / "g.jsonl", [{**row(n), "meta": {"group": 1}} for n in range(9)]), "fewer than two"),
    (lambda p: task(p / "t", train=ROWS, instruction=3), "field 'instruction': is int"),
])  # fmt: skip
def test_data_that_cannot_be_used_say_what_to_do(tmp_path: Path, make, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_dataset(make(tmp_path))


# --- recipes -------------------------------------------------------------------------------------------------------


def test_a_recipe_is_defaults_then_file_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("rank = 4\nepochs = 2\n")
    recipe = load_recipe(path, parse_sets(["epochs=1.5", "learning_rate=1e-4", "target_modules=q_proj, v_proj"]))
    assert (recipe.rank, recipe.epochs, recipe.learning_rate) == (4, 1.5, 1e-4)
    assert recipe.target_modules == ("q_proj", "v_proj")
    assert recipe.batch_size == Recipe().batch_size


@pytest.mark.parametrize(("words", "told"), [
    (["learningrate=1"], "Did you mean learning_rate"),
    (["rank"], "has no '='"),
    (["rank=many"], r"--set rank: .*'many'"),
    (["rank=0"], "rank is rank of the LoRA"),
    (["early_stop=perhaps"], "--set early_stop"),
    (["precision=int4"], "--set precision"),
])  # fmt: skip
def test_a_wrong_set_names_the_key_and_the_remedy(words: list[str], told: str) -> None:
    with pytest.raises(BadRequest, match=told):
        load_recipe(None, parse_sets(words))


def test_a_wrong_recipe_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for text, told in (("ranks = 4", "ranks: no recipe has this key. Did you mean rank"), ("rank = [", "not valid")):
        path.write_text(text)
        with pytest.raises(BadRequest, match=told):
            load_recipe(path, {})
