"""Answers that a model writes: decoding, figures, and which public records are asked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from transformers import AutoTokenizer, GenerationConfig

from fedlora_flwr.errors import InvalidValue, NotInstalled
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.report.scales import WRITTEN
from fedlora_flwr.tasks.answers import Answer, figures, measured
from fedlora_flwr.tasks.chats import end_of_answers
from fedlora_flwr.tasks.generation import write_answers
from fedlora_flwr.tasks.registry import build_task
from tests.backbones import checkpoints
from tests.tasks.conversations import LAYERS, TEXTS, Make, chat, messy_rows
from tests.tasks.questions import messy_rows as messy_questions
from tests.tasks.tiny_tasks import WORDS, Row, fill

pytestmark = pytest.mark.usefixtures("empty_cache")
every_model = pytest.mark.parametrize("model", LAYERS)


def public(make: Make, rows: list[Row], model: str | Path = "llama", **changes: Any) -> Any:
    """Return the task as a server has it: with a public split alone."""
    return make(rows, model, train_split="none", **changes)


def likeliest(model: Any, tokenizer: Any, prompt: str, stops: set[int], most: int) -> str:
    """Write an answer one token after another, without a cache, padding or `generate`."""
    given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < most:
            scores = model(input_ids=torch.tensor([given + new])).logits[0, -1]
            if (token := int(scores.argmax())) in stops:
                break
            new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True))


@every_model
def test_an_answer_is_that_of_a_loop_with_any_batch_and_adapter(
    make_chats: Make, model: str
) -> None:
    task = public(make_chats, messy_rows(30), model, max_new_tokens=9, generation_limit=12)
    adapted = attach(task.build_model(), LoRASpec(2, 4.0, 0.0, LAYERS[model]), seed=1)
    fill(adapted.parameters)
    adapted.model.train()
    tokenizer, net = task._tokenizer, adapted.model
    prompts = [prompt for prompt, *_ in task._asked]
    assert len({*prompts}) > 8
    stops = {tokenizer.eos_token_id, net.config.eos_token_id, *end_of_answers(tokenizer)}

    found = [
        write_answers(net, tokenizer, prompts, end_of_answers(tokenizer), most=9, batch_size=n)
        for n in (1, 5, 64)
    ]

    assert net.training
    net.eval()
    wanted = [likeliest(net, tokenizer, prompt, stops, 9) for prompt in prompts]
    assert len({*wanted}) > 4
    assert found == [wanted] * 3
    assert [one.said for one in task.answers(net)] == wanted


def test_what_a_checkpoint_asks_of_its_generation_is_left_out(make_chats: Make) -> None:
    task = public(make_chats, messy_rows(12), max_new_tokens=20, generation_limit=8)
    net: Any = task.build_model()
    wanted = task.answers(net)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=50.0, no_repeat_ngram_size=1,
        eos_token_id=net.generation_config.eos_token_id,
    )  # fmt: skip
    net.generation_config = own

    assert task.answers(net) == wanted
    assert net.generation_config is own
    tokens = [task._tokenizer(one.said)["input_ids"] for one in wanted]
    assert any(len(said) > len({*said}) for said in tokens), "no answer repeats a token"


def test_an_answer_ends_where_the_template_ends_answers(make_chats: Make) -> None:
    task = public(make_chats, [chat(("user", "bali"), ("assistant", "yes"))], generation_limit=1)
    net: Any = task.build_model()
    tokenizer = task._tokenizer
    assert tokenizer.decode(end_of_answers(tokenizer)) == "<|end|>"
    assert end_of_answers(tokenizer)[0] != tokenizer.eos_token_id
    with torch.no_grad():  # Of all tokens, the end of an answer is the likeliest everywhere.
        net.lm_head.weight.zero_()
        net.lm_head.weight[end_of_answers(tokenizer)[0]] = 1.0
        net.model.norm.weight.abs_()
    scores = net(input_ids=torch.tensor([[0, 4]])).logits[0, -1]
    if scores.argmax() != end_of_answers(tokenizer)[0]:
        with torch.no_grad():
            net.lm_head.weight.neg_()
    assert [one.said for one in task.answers(net)] == [""]


def test_a_template_without_an_end_leaves_the_tokenizers(make_chats: Make, tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    folder = checkpoints.llama(tmp_path / "plain", TEXTS, plain)
    assert end_of_answers(AutoTokenizer.from_pretrained(folder)) == ()


def test_a_prompt_near_the_models_end_gets_what_room_there_is(make_chats: Make) -> None:
    rows = [chat(("user", "bali " * n), ("assistant", "yes")) for n in (1, 116, 122, 122)]
    task = public(make_chats, rows, max_length=256, max_new_tokens=30)
    net, tokenizer = task.build_model(), task._tokenizer
    prompts = [f"<s><|user|>{row['messages'][0]['content']}<|assistant|>" for row in rows]
    sizes = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    assert sizes[0] + 30 < 256 < sizes[1] + 30

    found = write_answers(net, tokenizer, prompts, most=30, batch_size=4)

    stops = {tokenizer.eos_token_id, net.config.eos_token_id}
    room = [min(30, 256 - size) for size in sizes]
    pairs = zip(prompts, room, strict=True)
    assert found == [likeliest(net.eval(), tokenizer, text, stops, most) for text, most in pairs]
    with pytest.raises(InvalidValue, match=r"record 1 .* of 260 tokens.* at most 255 tokens"):
        write_answers(net, tokenizer, ["x", "bali " * 130], most=1, batch_size=2)


def spoken(rng: random.Random) -> str:
    return " ".join(rng.choices([*WORDS[:6], "Bali,", "a-b", "naïve"], k=rng.randrange(6)))


def test_figures_are_those_of_rouge_score_and_of_plain_strings() -> None:
    rng = random.Random(3)
    answers = [
        Answer("?", tuple(spoken(rng) for _ in range(1 + n % 3)), f" {spoken(rng)}\n" * (n % 5 > 0))
        for n in range(200)
    ]

    found = figures(answers)

    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rouge, hits = [], []
    for one in answers:
        rouge.append(max(scorer.score(text, one.said)["rougeL"].fmeasure for text in one.right))
        hits.append(any(text.strip() == one.said.strip() for text in one.right))
    assert tuple(found) == WRITTEN
    assert found["rouge_l"] == pytest.approx(np.mean(rouge))
    assert found["exact_match"] == pytest.approx(np.mean(hits))
    assert 0 < found["exact_match"] < found["rouge_l"] < 1


def test_figures_by_hand() -> None:
    # "the old town" is a subsequence of four words: precision 1, recall 3/4, F 6/7.
    answers = [
        Answer("?", ("in the old town",), "The old town!"),
        Answer("?", ("yes", "it is"), " it is\n"),
    ]
    found = figures(answers)
    assert found == {"rouge_l": pytest.approx((6 / 7 + 1) / 2), "exact_match": 0.5}


def test_who_is_asked_follows_from_the_records_alone(make_chats: Make) -> None:
    rows = messy_rows(40)
    first, again = (public(make_chats, rows, generation_limit=6, seed=seed) for seed in (1, 2))
    assert first._asked == again._asked
    more = public(make_chats, rows, generation_limit=9)
    assert more._asked[:6] == first._asked
    assert len(more._asked) == 9
    every = public(make_chats, rows, generation_limit=1000, max_length=200)._asked
    answered = [row["messages"] for row in rows if last_words(row["messages"])]
    assert sorted(right for *_, right in every) == sorted(map(last_words, answered))
    # Files are often sorted.
    assert [right for *_, right in every] != [last_words(chat) for chat in answered]
    prompt, text, right = every[0]
    assert right not in text.splitlines()[-1]
    assert prompt.endswith("<|assistant|>")


def last_words(messages: list[dict[str, str]]) -> str:
    said = [one["content"] for one in messages if one["role"] == "assistant"]
    return said[-1] if said and said[-1].strip() else ""


def test_conversations_that_cannot_be_asked_are_left_out_and_none_is_refused(
    make_chats: Make,
) -> None:
    asked = chat(("user", "bali"), ("assistant", "yes"), ("user", "dona"))
    rows = [
        chat(("user", "bali " * 300), ("assistant", "yes")),  # Beyond max-length.
        chat(("user", "dona")),
        chat(("user", "dona"), ("assistant", " ")),
        asked,
    ]
    task = public(make_chats, rows, generation_limit=5)
    assert [text for _, text, _ in task._asked] == ["user: bali"]
    none = public(make_chats, rows[:3], generation_limit=5)
    with pytest.raises(InvalidValue, match=r"generation-limit = 5 .* within max-length = 64"):
        none.answers(none.build_model())


def test_a_private_record_is_never_asked(make_chats: Make, tmp_path: Path) -> None:
    """The reader of a report is the attacker: no prompt that is shown may be private.

    The splits overlap by mistake, which a simulation only warns of.
    """
    rows = [chat(("user", word), ("assistant", "yes it is")) for word in WORDS[:10]]
    task = make_chats(rows[:6], generation_limit=100)
    checkpoints.write_split(tmp_path / "set", "validation", [*rows[3:], rows[4]])
    assert sorted(text for _, text, _ in task._asked) == sorted(
        f"user: {word}" for word in WORDS[6:10]
    )
    answers = task.answers(task.build_model())
    assert all(one.right == ("yes it is",) for one in answers)
    every = make_chats(rows, generation_limit=100)
    with pytest.raises(InvalidValue, match="no public record that is not private"):
        every.answers(every.build_model())


def test_questions_are_compared_by_their_spans(make_questions: Any, tmp_path: Path) -> None:
    rows = [
        {**row, "question": f"{row['question']} {n}"} for n, row in enumerate(messy_questions(40))
    ]
    task = make_questions(rows, generation_limit=12)
    (tmp_path / "set" / "train.jsonl").unlink()
    net = task.build_model()
    own = task.evaluate(net, task.test_records())

    metrics, answers = measured(task, net, task.test_records(), write=True)

    # The task's own exact match, of all questions, has precedence.
    assert metrics == {**own, "rouge_l": pytest.approx(figures(answers)["rouge_l"])}
    by_question = {row["question"]: row for row in rows}
    assert len(answers) == 12
    for one in answers:
        golds = by_question[one.prompt]["answers"]["text"]
        assert one.right
        assert one.right == tuple(text for text in golds if text.strip())
        assert one.said in by_question[one.prompt]["context"]
    assert measured(task, net, task.test_records(), write=False) == (own, [])


def test_a_task_that_writes_nothing_refuses_to_be_asked(
    make_chats: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = public(make_chats, [chat(("user", "bali"), ("assistant", "yes"))], generation_limit=3)
    settings = task._settings
    allowed = r"generation-limit = 3 .* 0 where task = 'digits', which writes no answers"
    with pytest.raises(InvalidValue, match=allowed):
        build_task("digits", settings)
    build_task("instruction-tuning", settings)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    monkeypatch.setattr("fedlora_flwr.errors._installed", lambda module: module != "rouge_score")
    sentence = r"rouge_score is not installed\. Run pip install 'fedlora-flwr\[generation\]'\."
    with pytest.raises(NotInstalled, match=sentence):
        build_task("instruction-tuning", settings)
