from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from fedlora_flwr.adapters import LoRASpec, attach
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.simulations.forecast import activation_bytes, skeleton
from fedlora_flwr.simulations.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import make_plan, run_in_process
from fedlora_flwr.tasks.answers import QuestionAnswering
from fedlora_flwr.tasks.registry import build_task
from fedlora_flwr.tasks.squad import exact_match, f1
from fedlora_flwr.tasks.windows import NO_TARGET, gold_answers
from tests.conftest import MakeConfig
from tests.tasks import checkpoints

# 64 words, each one token.
WORDS = [a + b + c + d for a in "bdkm" for b in "ao" for c in "lnrs" for d in "iu"]
NUMBERS = ["one", "two", "three", "four", "five"]
SPECIAL = {"bert": ([2], [3], [3]), "roberta": ([0], [2, 2], [2])}
pytestmark = pytest.mark.usefixtures("empty_cache")

Row = dict[str, Any]
Window = tuple[list[int], list[tuple[int, int] | None]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, texts = tmp_path_factory.mktemp("models"), [" ".join(WORDS + NUMBERS)] * 5
    return {name: getattr(checkpoints, name)(folder / name, texts) for name in SPECIAL}


@pytest.fixture
def make_task(models: dict[str, Path], tmp_path: Path) -> Any:
    """Return a function that writes records as both splits and makes the task on them."""

    def make(
        rows: Sequence[Row], model: str | Path = "bert", **changes: object
    ) -> QuestionAnswering:
        for split in ("train", "validation"):
            checkpoints.write_split(tmp_path / "set", split, rows)
        dashed = {key.replace("_", "-"): value for key, value in changes.items()}
        start = {
            "model": str(models.get(str(model), model)),
            "dataset": str(tmp_path / "set"),
            "partitioner": "iid",
            "min-records": 1,
            "max-length": 48,
        }
        return QuestionAnswering(RunConfig.of(start, dashed))

    return make


def row(context: str, *answers: tuple[str, int], question: str = "bali balu") -> Row:
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return {
        "question": question,
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }


def messy_rows(count: int) -> list[Row]:
    """Return records with pieces of words, blanks, long answers, and questions without one."""
    rng, rows = random.Random(1), []
    words = [*WORDS, "balidona", "xyz", "km,", "(one)", "née"]
    for _ in range(count):
        context = rng.choice(["", " "]) + "".join(
            word + rng.choice([" ", " ", "  ", "-"])
            for word in rng.choices(words, k=rng.randrange(70))
        )
        answers = []
        for _ in range(rng.choice([0, 1, 1, 1, 2]) if context.strip() else 0):
            begin = rng.randrange(len(context))
            text = context[begin : begin + rng.choice([1, 4, 9, 30, 200])]
            answers.append((text, begin))
        question = " ".join(rng.choices(words, k=rng.choice([0, 2, 5, 40])))
        rows.append(row(context, *answers, question=question))
    return rows


def windows_of(
    tokenizer: Any, model: str, question: str, context: str, limit: int
) -> Iterator[Window]:
    """Cut a context by hand; yield tokens, and of each its place in the context."""
    first, middle, last = SPECIAL[model]
    asked = tokenizer(question, add_special_tokens=False)["input_ids"][: limit // 3]
    told = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    tokens, places = told["input_ids"], told["offset_mapping"]
    room = limit - len(asked) - len(first + middle + last)
    start = 0
    while True:
        part = slice(start, start + room)
        yield (
            first + asked + middle + tokens[part] + last,
            [None] * len(first + asked + middle) + places[part] + [None] * len(last),
        )
        if start + room >= len(tokens):
            return
        start += room - limit // 3


def target_in(places: list[tuple[int, int] | None], context: str, text: str, begin: int) -> Any:
    """Return the tokens that hold an answer's characters, if all that are not blank are held."""
    wanted = {begin + i for i in range(len(text)) if not context[begin + i].isspace()}
    holding = {
        char: position
        for position, place in enumerate(places)
        for char in (range(*place) if place else ())
        if char in wanted
    }
    return (min(holding.values()), max(holding.values())) if set(holding) == wanted else None


def all_records(task: QuestionAnswering, training: bool) -> list[dict[str, Tensor]]:
    records = task.client_records(0, 1) if training else task.test_records()
    return [records.batch(torch.tensor([i])) for i in range(len(records))]


@pytest.mark.parametrize("model", SPECIAL)
@pytest.mark.parametrize("limit", [15, 16, 31, 48])
def test_windows_are_those_cut_by_hand(make_task: Any, model: str, limit: int) -> None:
    rows = messy_rows(60)
    task = make_task(rows, model, max_length=limit)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    trained, tested = (all_records(task, training) for training in (True, False))
    assert len(trained) == len(rows)
    kinds = set()

    position = 0
    for number, (record, private) in enumerate(zip(rows, trained, strict=True)):
        texts = gold_answers(record["answers"])
        cut = list(windows_of(tokenizer, model, record["question"], record["context"], limit))
        found = [target_in(places, record["context"], *a) for _, places in cut for a in texts[:1]]
        chosen = next((i for i, place in enumerate(found) if place), 0)
        target = (found or [None])[chosen] or (0, 0)
        kinds.add((bool(texts), target != (0, 0), min(chosen, 1)))
        for i, (tokens, places) in enumerate(cut):
            window = tested[position]
            assert window["question"] == number
            assert window["input_ids"].tolist() == [tokens]
            plain = [(-1, -1) if place is None else place for place in places]
            assert window["begins"].tolist() == [[begin for begin, _ in plain]]
            assert window["ends"].tolist() == [[end for _, end in plain]]
            assert window["none"] == 0
            here = target if i == chosen else (NO_TARGET, NO_TARGET)
            assert (window["start"], window["end"]) == here
            position += 1
        assert private["input_ids"].tolist() == [cut[chosen][0]]
        assert (private["start"], private["end"]) == target
        assert not {"question", "begins", "ends", "none"} & set(private)
    assert position == len(tested) > len(rows)
    both = task.test_records().batch(torch.arange(2))
    longest = both["attention_mask"].sum(1).max()
    for name in ("begins", "ends"):
        assert both[name].shape == (2, longest)
        assert (both[name][both["attention_mask"] == 0] == -1).all()
    # Answered, unanswerable, in no window, in a later window: all have occurred.
    assert kinds >= {(False, False, 0), (True, True, 0), (True, False, 0), (True, True, 1)}


def test_a_whole_word_answer_is_what_the_target_says(make_task: Any) -> None:
    context = " ".join(WORDS)
    rows = [row(context, (word, context.index(word)), (WORDS[0], 0)) for word in WORDS]
    task = make_task(rows, max_length=20)

    windows = [window for window in all_records(task, False) if window["start"] != NO_TARGET]

    for window, word in zip(windows, WORDS, strict=True):
        begin, end = window["begins"][0, window["start"]], window["ends"][0, window["end"]]
        assert context[begin:end] == word


@pytest.mark.parametrize("layout", ["lists", "structs", "parquet", "nothing"])
def test_every_layout_of_answers_is_read(make_task: Any, tmp_path: Path, layout: str) -> None:
    context = "bali dona kulu"
    rows = [row(context), row(context, ("dona", 5), ("kulu", 10)), row(context, ("kulu", 10))]
    task = make_task(rows)
    expected = all_records(task, False)
    for record in rows:
        pairs = zip(*record["answers"].values(), strict=True)
        if layout == "structs":
            record["answers"] = [{"text": text, "answer_start": begin} for text, begin in pairs]
        if layout == "nothing" and not record["answers"]["text"]:
            record["answers"] = None
    folder = tmp_path / "set"
    for path in folder.iterdir():
        path.unlink()
    for split in ("train", "validation"):
        if layout == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        else:
            checkpoints.write_split(folder, split, rows)

    again = QuestionAnswering(task._settings)

    assert [{k: v.tolist() for k, v in found.items()} for found in all_records(again, False)] == [
        {k: v.tolist() for k, v in found.items()} for found in expected
    ]
    assert again._golds == [[], ["dona", "kulu"], ["kulu"]]


def test_a_tokenizer_with_a_truncation_of_its_own_makes_the_same_windows_once(
    make_task: Any, models: dict[str, Path], tmp_path: Path, empty_cache: Path
) -> None:
    rows, limits = messy_rows(20), {"direction": "Left", "max_length": 9, "stride": 0}
    expected = [window["input_ids"].tolist() for window in all_records(make_task(rows), False)]
    folder = tmp_path / "truncating"
    shutil.copytree(models["bert"], folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {**limits, "strategy": "LongestFirst"}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))

    for order in ((False, True), (True, False)):
        task = make_task(rows, model=folder)
        found = {training: all_records(task, training) for training in order}
        assert [window["input_ids"].tolist() for window in found[False]] == expected
        # The second task finds what the first has made, whichever split it asks for first.
        assert len([*empty_cache.glob("fedlora/datasets/*.lock")]) == 3
    assert len(all_records(make_task(rows, max_length=16), False)) > len(expected)


@pytest.mark.parametrize("model", SPECIAL)
def test_a_loss_is_that_of_transformers_on_the_record_alone(make_task: Any, model: str) -> None:
    task = make_task(messy_rows(24), model, max_length=32)
    net = task.build_model().eval()
    records = task.client_records(0, 1)

    losses = task.losses(net, records.batch(torch.arange(24)))

    for i, loss in enumerate(losses):
        alone = records.batch(torch.tensor([i]))
        start, end = alone.pop("start"), alone.pop("end")
        expected = net(**alone, start_positions=start, end_positions=end).loss
        torch.testing.assert_close(loss, expected)


def test_losses_of_a_model_in_half_precision_are_in_full(make_task: Any) -> None:
    task = make_task(messy_rows(4))
    net = task.build_model().bfloat16()
    assert task.losses(net, task.client_records(0, 1).batch(torch.arange(4))).dtype == torch.float32


@pytest.mark.parametrize("model", SPECIAL)
def test_each_record_has_its_own_gradient(make_task: Any, model: str) -> None:
    task = make_task(messy_rows(12), model, max_length=32)
    records = task.client_records(0, 1)
    spec = LoRASpec(2, 4.0, 0.0, r".*\.(query|value)", task.head)
    adapted = attach(task.build_model(), spec, seed=1)
    filled(adapted.parameters)
    engine = PrivateEngine(adapted, task.losses)
    names = list(adapted.parameters)
    assert names[-2:] == ["qa_outputs.weight", "qa_outputs.bias"]

    engine.verify(records)
    found = engine.gradients_by_record(records, torch.arange(12), names)

    plain = attach(task.build_model(), spec, seed=1)
    filled(plain.parameters)
    for i in range(12):
        loss = task.losses(plain.model, records.batch(torch.tensor([i]))).sum()
        expected = torch.autograd.grad(loss, list(plain.parameters.values()))
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-3, atol=1e-6)


def filled(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give adapters values at which no gradient is zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


class Scorer(nn.Module):
    """Scores tokens by what they are and where they stand, no answer also by all the others."""

    def __init__(self, tokens: int, none: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.tokens = nn.Parameter(scale * torch.randn(tokens, 2, generator=generator))
        self.places = nn.Parameter(scale * torch.randn(200, 2, generator=generator))
        with torch.no_grad():
            self.tokens[0] = 0.0  # Padding.
            self.tokens[2] = none

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        tokens = self.tokens[input_ids]
        scores = tokens + self.places[: input_ids.shape[1]]
        scores[:, 0] += tokens[:, 1:].sum(1) / 8
        start, end = scores.unbind(-1)
        return SimpleNamespace(start_logits=start, end_logits=end)


def answer_of(model: Scorer, windows: Sequence[Window], context: str, may_be_none: bool) -> str:
    """Return the best answer by a search over all pairs of tokens."""
    spans, nones = [(-torch.inf, 0, 0)], []
    for tokens, places in windows:
        found = model(torch.tensor([tokens]))
        starts, ends = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        inside = [i for i, place in enumerate(places) if place]
        first = sorted(inside, key=lambda i: -starts[i])[:20]
        last = sorted(inside, key=lambda i: -ends[i])[:20]
        nones.append(starts[0] + ends[0])
        spans += [
            (starts[i] + ends[j], places[i][0], places[j][1])  # type: ignore[index]
            for i in first
            for j in last
            if i <= j < i + 30
        ]
    score, begin, end = max(spans, key=lambda span: span[0])
    return "" if may_be_none and min(nones) > score else context[begin:end]


@pytest.mark.parametrize(("answerable", "none"), [(False, 5.0), (False, -9.0), (True, 9.0)])
@pytest.mark.parametrize("limit", [16, 48])
def test_predictions_are_those_of_a_search_over_all_spans(
    make_task: Any, answerable: bool, none: float, limit: int
) -> None:
    rows = [row for row in messy_rows(80) if not answerable or gold_answers(row["answers"])]
    task = make_task(rows, max_length=limit, eval_batch_size=7)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    model = Scorer(len(tokenizer), none / 2)
    model.train()

    measured = task.evaluate(model, task.test_records())

    assert model.training
    found = []
    for record in rows:
        texts = record["answers"]["text"]
        question, context = record["question"], record["context"]
        windows = list(windows_of(tokenizer, "bert", question, context, limit))
        said = answer_of(model, windows, context, not answerable)
        found.append((said, [text for text in texts if text.strip()]))
    losses = [task.losses(model, record).item() for record in all_records(task, True)]
    assert measured["exact_match"] == pytest.approx(np.mean([exact_match(*pair) for pair in found]))
    assert measured["f1"] == pytest.approx(np.mean([f1(*pair) for pair in found]))
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    if none == 5.0:
        empty = [said == "" for said, _ in found]
        assert 0.1 < np.mean(empty) < 0.9
    order = torch.randperm(len(task.test_records()), generator=torch.Generator().manual_seed(0))
    shuffled = task.test_records().subset(order.numpy())
    assert task.evaluate(model, shuffled) == pytest.approx(measured, rel=1e-6)


LINE = " ".join(WORDS[:40])


@pytest.mark.parametrize(
    ("scores", "answer", "said"),
    [
        ({3: (5, 0), 5: (0, 5)}, WORDS[3], " ".join(WORDS[3:6])),
        ({3: (1, 5), 5: (4, 0)}, WORDS[3], WORDS[3]),  # Nothing ends before it starts.
        ({3: (5, 5)}, WORDS[3], WORDS[3]),
        ({2: (5, 0), 31: (0, 5)}, WORDS[2], " ".join(WORDS[2:32])),  # 30 tokens.
        ({2: (5, 0), 32: (0, 4)}, WORDS[2], WORDS[2]),  # 31 of them.
        # The end that the best start would take is only the 21st best.
        (
            {i: (0.0, 2.0 if i == 29 else 1.0) for i in range(10, 30)}
            | {35: (9.0, 0.0), 36: (0.0, 0.5)},
            WORDS[29],
            WORDS[29],
        ),
        # Here it is the 20th.
        (
            dict.fromkeys(range(10, 29), (0.0, 1.0)) | {35: (9.0, 0.0), 36: (0.0, 0.5)},
            WORDS[35],
            " ".join(WORDS[35:37]),
        ),
    ],
)
def test_the_best_span_by_hand(
    make_task: Any, scores: Mapping[int, tuple[float, float]], answer: str, said: str
) -> None:
    task = make_task([row(LINE, (answer, LINE.index(answer)))])
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    # A little for the shorter span, so that there are no ties.
    model = Scorer(len(tokenizer), 100.0, scale=0.0)
    with torch.no_grad():
        for i, word in enumerate(WORDS[:40]):
            start, end = scores.get(i, (0.0, 0.0))
            values = torch.tensor([start + i / 1e3, end - i / 1e3])
            model.tokens[tokenizer.convert_tokens_to_ids(word)] = values

    measured = task.evaluate(model, task.test_records())

    assert measured["f1"] == pytest.approx(f1(said, [answer]))
    assert measured["exact_match"] == float(said == answer)


def test_no_answer_wins_where_its_lowest_score_is_above_the_best_span(make_task: Any) -> None:
    # The second of two windows of the first question is without its answer.
    rows = [row(LINE, (WORDS[5], LINE.index(WORDS[5]))), row(WORDS[9])]
    task = make_task(rows, max_length=30)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    model = Scorer(len(tokenizer), 1.0, scale=0.0)
    first = tokenizer.convert_tokens_to_ids(WORDS[5])

    def said(best: float, none: float) -> list[float]:
        with torch.no_grad():
            model.tokens[first] = best / 2
            model.tokens[2] = none / 2
        measured = task.evaluate(model, task.test_records())
        return [measured["exact_match"], measured["f1"]]

    assert said(3.0, 2.0) == [1, 1]  # The first answered, the second not.
    assert said(2.0, 2.0) == [1, 1]  # Even is not above.
    assert said(2.0, 3.0) == [0.5, 0.5]  # Neither.
    assert said(2.0, -1.0) == [0.5, 0.5]  # Both.


def test_a_private_record_is_a_question_and_splits_are_measured_together(
    make_task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Some contexts are longer than what the tokenizer says that the model takes.
    rows = [*messy_rows(29), row(" ".join(WORDS * 2))]
    task = make_task(rows, max_length=20)
    model = task.build_model()
    checkpoints.write_split(tmp_path / "set", "first", rows[:11])
    checkpoints.write_split(tmp_path / "set", "second", rows[11:])
    parts = make_task(rows, max_length=20, test_split="first,second")

    assert len(task.client_records(0, 3)) == len(task.client_records(2, 3)) == 10
    assert len(task.test_records()) == len(parts.test_records()) > 30
    whole = task.evaluate(model, task.test_records())
    assert whole == task.evaluate(model.train(), task.test_records())
    assert parts.evaluate(model, parts.test_records()) == pytest.approx(whole)
    assert set(whole) == {"loss", "f1", "exact_match"}
    assert not caplog.records


def test_a_server_needs_no_private_split(make_task: Any, tmp_path: Path) -> None:
    task = make_task([row(LINE, (WORDS[0], 0))])
    (tmp_path / "set" / "train.jsonl").unlink()

    assert task.evaluate(task.build_model(), task.test_records())["f1"] <= 1
    with pytest.raises(InvalidValue, match="split = 'train'"):
        task.client_records(0, 1)


def test_records_are_split_by_any_column(make_task: Any) -> None:
    rows = [{**row(LINE, (WORDS[0], 0)), "title": title} for title in "aabab"]

    task = make_task(rows, partitioner="natural-id", partition_column="title")

    assert [len(task.client_records(i, 2)) for i in range(2)] == [3, 2]


def test_a_head_has_two_outputs_whatever_the_checkpoint_says(
    make_task: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(models["bert"], tmp_path / "classes")
    config = tmp_path / "classes" / "config.json"
    labels = {"id2label": {str(i): str(i) for i in range(5)}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **labels}))

    task = make_task([row(LINE, (WORDS[0], 0))], tmp_path / "classes")

    assert task.head == ("qa_outputs",)
    assert task.build_model().qa_outputs.out_features == 2


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"report_unprotected_metrics": True}, "report-unprotected-metrics", "one window"),
        ({"max_length": 11}, "max-length", "at least 12"),
        ({"max_length": 65}, "max-length", "at most 64"),
        ({"partitioner": "dirichlet"}, "partition-column", "one of"),
        ({"weights": "none"}, "weights", "'random'"),
    ],
)
def test_bad_settings_are_named(
    make_task: Any, changes: dict[str, object], key: str, allowed: str
) -> None:
    def start() -> None:
        task = make_task([row(LINE, (WORDS[0], 0))], **changes)
        task.build_model()
        task.client_records(0, 1)

    with pytest.raises(InvalidValue) as caught:
        start()

    assert caught.value.key == key
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("column", ["question", "context", "answers"])
def test_a_data_set_of_another_layout_is_named(make_task: Any, column: str) -> None:
    record = row(LINE, (WORDS[0], 0))
    del record[column]

    with pytest.raises(InvalidValue, match=r"dataset = .* columns question, context, answers"):
        make_task([record]).client_records(0, 1)


def test_nothing_to_evaluate_is_refused(make_task: Any) -> None:
    task = make_task([row(LINE, (WORDS[0], 0))])
    with pytest.raises(InvalidValue, match="records"):
        task.evaluate(task.build_model(), task.test_records().subset(np.array([], dtype=np.int64)))


def test_memory_is_counted_without_weights(make_task: Any) -> None:
    task = make_task([row(LINE, (WORDS[0], 0))])
    adapted = skeleton(task._settings, task)

    sizes = [activation_bytes(task, adapted, task.largest_batch(n)) for n in (2, 4)]

    assert sizes[0] is not None
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)


def toy_rows(count: int, seed: int) -> list[Row]:
    """Return records whose answer is the one number in the context."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(4, 12))
        place = rng.randrange(len(words))
        words[place] = rng.choice(NUMBERS)
        begin = len(" ".join([*words[:place], ""]))
        rows.append(row(" ".join(words), (words[place], begin)))
    return rows


def test_a_private_run_learns_and_plain_peft_answers_like_it(
    make_config: MakeConfig,
    models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoints.write_split(tmp_path / "set", "train", toy_rows(240, 0))
    checkpoints.write_split(tmp_path / "set", "validation", toy_rows(60, 1))
    config = make_config(
        task="question-answering",
        model=str(models["bert"]),
        dataset=str(tmp_path / "set"),
        max_length=32,
        strategy="ffa-lora",
        num_rounds=3,
        local_steps=4,
        optimizer="adamw",
        lr_b=0.02,
        lr_head=0.2,
    )
    run_dir = RunDirectory(tmp_path / "run")

    plan = make_plan(config)
    assert "".join(capfd.readouterr()) == ""
    summary = run_in_process(plan, run_dir, lambda row: None)

    rows = run_dir.rows("rounds")
    assert min(mechanism.noise_multiplier for mechanism in plan.mechanisms) > 0.5
    assert rows[0]["f1"] < 0.3
    assert rows[-1]["f1"] > 0.6
    assert rows[-1]["exact_match"] > 0.5
    assert summary["status"] == "completed"
    base = AutoModelForQuestionAnswering.from_pretrained(models["bert"])
    plain = PeftModel.from_pretrained(base, str(run_dir.adapter))
    task = build_task(config.task, config)
    found = task.evaluate(plain, task.test_records())
    assert found == pytest.approx({name: rows[-1][name] for name in found}, rel=1e-5)
