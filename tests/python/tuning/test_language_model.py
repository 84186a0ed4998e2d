"""The model that a policy is fitted to: its settings, its limits, and prompts that it cannot take."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_model
from csulora.errors import InputError
from csulora.tuning.language_model import LanguageModel, _Inputs, agreeing
from csulora.tuning.loading import Loading
from csulora.tuning.probes import Chat, Message, parse

pytestmark = pytest.mark.usefixtures("one_thread")


def asking(text: str) -> tuple[Chat]:
    return ((Message("user", text),),)


def test_replies_are_greedy_whatever_the_model_says_of_its_generation(
    language_model: LanguageModel, place: tiny_model.Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(place.aligned, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.8, "max_length": 9}
    (model / "generation_config.json").write_text(json.dumps(config))
    prompts = parse(place.task.read_bytes())
    other = LanguageModel.open(str(model), Loading("cpu"), tiny_model.REPLY)
    capfd.readouterr()
    replies = other.replies(prompts)
    assert [reply.tokens.tolist() for reply in replies] == [
        reply.tokens.tolist() for reply in language_model.replies(prompts)
    ]
    assert all(agreeing(other, replies))
    assert not capfd.readouterr().err


def test_a_prompt_that_leaves_no_room_for_the_reply_is_refused(language_model: LanguageModel) -> None:
    longest = 64 - tiny_model.REPLY  # of the model's 64 positions
    assert language_model.replies(asking("w1 " * longest))[0].start == longest
    with pytest.raises(InputError, match=r"'w1 w1 .*\.\.\.' has 59 tokens and its reply up to 6; the model takes 64"):
        language_model.replies(asking("w1 " * (longest + 1)))


def test_turns_that_a_model_without_a_chat_template_would_not_see_are_refused(language_model: LanguageModel) -> None:
    chat = (Message("system", "w1 w2"), Message("user", "w3"))
    with pytest.raises(InputError, match="no chat template, and the prompt 'w3' has 2 turns"):
        language_model.replies((chat,))


def test_a_prompt_of_no_tokens_is_refused(language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "tokenizer", lambda text: {"input_ids": []})
    monkeypatch.setattr(language_model.tokenizer, "chat_template", None, raising=False)
    with pytest.raises(InputError, match="'w1' has no tokens"):
        language_model.replies(asking("w1"))


def test_a_model_that_computes_nan_is_no_model_to_agree_with(language_model: LanguageModel) -> None:
    name, (rows, columns) = list(tiny_model.MODULES.items())[1]
    huge: tuple[Tensor, Tensor] = torch.full((rows, 1), 1e30), torch.full((1, columns), 1e30)
    with (
        language_model.adapted({name: huge}),
        pytest.raises(InputError, match=r"computes NaN in torch\.float32 for .*'w1'"),
    ):
        language_model.replies(asking("w1"))


def test_no_logits_of_long_prompts_are_computed(language_model: LanguageModel) -> None:
    texts = [torch.arange(length) % 20 + 4 for length in (50, 55)]
    starts = [46, 48]
    computed: list[int] = []
    hook = language_model.model.lm_head.register_forward_hook(lambda *given: computed.append(given[2].shape[1]))
    found = language_model.logits(texts, starts)
    language_model.read(texts)
    hook.remove()
    assert computed == [4 + 7, 1]
    for text, start, logits in zip(texts, starts, found.split([4, 7]), strict=True):
        whole = language_model.model(input_ids=text[None]).logits[0]
        torch.testing.assert_close(logits, whole[start - 1 : -1], atol=1e-4, rtol=0)


def test_a_head_that_sees_no_tokens_computes_all_logits(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, starts = [torch.arange(length) % 20 + 4 for length in (9, 12)], [5, 7]
    wanted = language_model.logits(texts, starts)
    for head in (None, torch.nn.Identity()):
        monkeypatch.setattr(language_model.model, "get_output_embeddings", lambda head=head: head)
        torch.testing.assert_close(language_model.logits(texts, starts), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_agrees_with_itself(place: tiny_model.Place, dtype: torch.dtype) -> None:
    language_model = LanguageModel.open(str(place.aligned), Loading("cpu"), tiny_model.REPLY)
    language_model.model.to(dtype)
    words = random.Random(0)
    texts = (" ".join(words.choices(tiny_model.WORDS, k=1 + at % 20)) for at in range(200))
    replies = language_model.replies([chat for text in texts for chat in asking(text)])
    assert all(agreeing(language_model, replies))
    assert all(agreeing(language_model, replies[3::4]))


def test_a_model_that_is_not_whole_is_refused(place: tiny_model.Place, tmp_path: Path) -> None:
    config = json.loads((place.aligned / "config.json").read_text())
    for name, changed, message in (
        ("deeper", {"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing, and 8 more weights"),
        ("wider", {"hidden_size": 64}, "does not load this model"),
        ("torn", {"num_attention_heads": "two"}, "does not load this model"),
    ):
        model = shutil.copytree(place.aligned, tmp_path / name)
        (model / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(InputError, match=message):
            LanguageModel.open(str(model), Loading("cpu"), tiny_model.REPLY)
    weights = shutil.copytree(place.aligned, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="does not load this model"):
        LanguageModel.open(str(weights.parent), Loading("cpu"), tiny_model.REPLY)


def test_a_directory_without_a_model_or_a_tokenizer_is_told(place: tiny_model.Place) -> None:
    for directory, message in (
        (place.adapters[0], "adapter1: holds no config.json; name the aligned model's directory first"),
        (place.aligned.with_name("base"), "base: holds no tokenizer; save the model's there"),
    ):
        with pytest.raises(InputError, match=message):
            LanguageModel.open(str(directory), Loading("cpu"), tiny_model.REPLY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reply_does_not_depend_on_what_else_is_in_its_batch(place: tiny_model.Place, dtype: torch.dtype) -> None:
    language_model = LanguageModel.open(str(place.aligned), Loading("cpu"), tiny_model.REPLY)
    language_model.model.to(dtype)
    prompts = [chat for words in range(1, 9) for chat in asking("w5 w6 " * words)]
    together = language_model.replies(prompts)
    for prompt, reply in zip(prompts, together, strict=True):
        (alone,) = language_model.replies([prompt])
        assert alone.tokens.tolist() == reply.tokens.tolist()
        torch.testing.assert_close(alone.logs, reply.logs, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)


def test_modules_that_read_the_same_share_a_copy_until_it_changes() -> None:
    inputs, source = _Inputs(), torch.ones(2, dtype=torch.float16)
    first = inputs.of(source, source.device, torch.float32)
    assert inputs.of(source, source.device, torch.float32) is first
    source += 1
    assert inputs.of(source, source.device, torch.float32).tolist() == [2, 2]
    with torch.inference_mode():
        assert inputs.of(torch.ones(2), source.device, torch.float32).tolist() == [1, 1]
