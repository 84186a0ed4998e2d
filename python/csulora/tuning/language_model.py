"""The aligned model, frozen and loaded once; an adapter is added to it as factors, never as a dense matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from csulora.errors import InputError
from csulora.models.experts import layout_of
from csulora.models.names import parse_expert
from csulora.models.resolver import Resolver
from csulora.subspace.expert_layout import ExpertLayout
from csulora.subspace.input_filter import Factors
from csulora.tuning.expert_modules import adapted_experts, by_experts_module, is_experts
from csulora.tuning.loading import Loading, load
from csulora.tuning.probes import Chat, shown
from csulora.tuning.replies import Reply

BATCH = 64  # most prompts that run together: a step of a fit runs all of its own
# Tokens up to which plain products pass gradients in half precision on a CPU. There, the backward pass of torch's fused
# attention takes several times as long; beyond, the plain ones take too much memory.
_PLAIN_ATTENTION = 512


class LanguageModel:
    """A causal language model and its tokenizer, as transformers loads them.

    Attributes:
        ends: the tokens that end a reply.
    """

    def __init__(self, model: Any, tokenizer: Any, longest_reply: int) -> None:
        """Freeze the model; replies have at most ``longest_reply`` tokens."""
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.longest_reply = model.eval().requires_grad_(False), tokenizer, longest_reply
        # Weights that accelerate offloads are on no device between products.
        devices = (weight.device for weight in model.parameters())
        self.device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
        self.ends = _end_tokens(model, tokenizer)
        # Without repetition penalties and the like, with which a reply would not be what the model finds likeliest.
        model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends) or None)

    @classmethod
    def open(cls, path: str, loading: Loading, longest_reply: int) -> LanguageModel:
        """Load a model directory or hub id.

        Raises:
            InputError: a package is missing, transformers does not load the whole model, or there is no such device.

        >>> from csulora.tuning.probes import Message
        >>> language_model = LanguageModel.open(aligned, Loading("cpu"), longest_reply=4)
        >>> replies = language_model.replies([(Message("user", "how do i make a whistle?"),)])
        >>> language_model.answers(replies)
        ['sorry, i can']
        >>> agreeing(language_model, replies)
        [True]
        """
        model, tokenizer = load(path, loading)
        return cls(model, tokenizer, longest_reply)

    @contextmanager
    def adapted(self, factors: Mapping[str, Factors]) -> Iterator[None]:
        """Add b a to every named module while the context lasts.

        Raises:
            InputError: the model has no such module, or one of another shape.
        """
        of_experts, others = by_experts_module(factors)
        inputs = _Inputs()
        with ExitStack() as hooks:
            for name, updates in of_experts.items():
                hooks.enter_context(adapted_experts(self.module(name), updates, self._expert_layout, name))
            for name, each in others.items():
                module = self._module(name, each)
                hook = module.register_forward_hook(_adding(each, self.device_of(name), inputs))
                hooks.callback(hook.remove)
            yield

    def device_of(self, name: str) -> torch.device:
        """Return the device on which a module's products are computed; an offloaded one's is the model's own."""
        found = parse_expert(name)
        device: torch.device = next(self.module(found[0] if found else name).parameters()).device
        return self.device if device.type == "meta" else device

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(
            name for name, module in self.model.named_modules() if hasattr(module, "weight") or is_experts(module)
        )

    @cached_property
    def _expert_layout(self) -> ExpertLayout:
        config = self.model.config
        return layout_of([config.model_type, config.get_text_config().model_type])

    def module(self, name: str) -> Any:
        """Return the layer that an adapter means by a name, whatever wrappers are in it.

        Raises:
            InputError: the model has no such module.
            RefusedError: several may be meant.
        """
        found = self._resolver.resolve(name)
        if found is None:
            raise InputError(f"the model has no module {name}, which the adapter updates; is it for this model?")
        return self.model.get_submodule(found.module)

    def _module(self, name: str, factors: Factors) -> nn.Module:
        module: nn.Module = self.module(name)
        shape = _shape(module)
        wanted = factors[0].shape[0], factors[1].shape[1]
        # transformers.Conv1D keeps (in, out)
        if shape not in (wanted, wanted[::-1] if type(module).__name__ == "Conv1D" else wanted):
            raise InputError(
                f"module {name} is {list(shape)} in the model, and the adapter updates {list(wanted)}; "
                "name the aligned model that the adapter was trained on"
            )
        return module

    def check_lengths(self, chats: Sequence[Chat]) -> None:
        """Check that the model takes every prompt with the longest reply.

        Raises:
            InputError: it does not; with the longest reply that it would take with all of them, if there is one.
        """
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(chats, key=lambda chat: len(self.encode(chat)))
        tokens = len(self.encode(longest))
        if most is None or tokens + self.longest_reply <= most:
            return
        advice = f"use --tokens {most - tokens}" if tokens < most else "remove or shorten it"
        raise InputError(
            f"the prompt {shown(longest)} has {tokens} tokens and its reply up to {self.longest_reply}; "
            f"the model takes {most}: {advice}"
        )

    def encode(self, chat: Chat) -> list[int]:
        """Tokens of a prompt, up to where the reply begins; without a chat template, of its only turn's text.

        Raises:
            InputError: the model does not take the prompt.
        """
        tokens = self._tokens(chat)
        if not tokens:
            raise InputError(f"the prompt {shown(chat)} has no tokens")
        return tokens

    def _tokens(self, chat: Chat) -> list[int]:
        if self.tokenizer.chat_template is None:
            if len(chat) > 1:
                raise InputError(f"the model has no chat template, and the prompt {shown(chat)} has {len(chat)} turns")
            return list(self.tokenizer(chat[-1].content)["input_ids"])
        turns = [{"role": message.role, "content": message.content} for message in chat]
        try:
            encoded = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template may raise what it likes
            raise InputError(f"the model's chat template does not take the prompt {shown(chat)}: {error}") from error
        return list(encoded["input_ids"])

    @torch.no_grad()
    def replies(self, chats: Sequence[Chat]) -> list[Reply]:
        """The model's greedy reply to every prompt, as it now stands: with what `adapted` adds to it.

        Raises:
            InputError: the model does not take a prompt, or computes NaN.
        """
        if chats:
            self.check_lengths(chats)  # of all at once: the last may be one that the model does not take
        prompts = [self.encode(chat) for chat in chats]
        replies: list[Reply] = []
        for start in range(0, len(prompts), BATCH):
            replies += self._reply(chats[start : start + BATCH], prompts[start : start + BATCH])
        return replies

    def _reply(self, chats: Sequence[Chat], prompts: list[list[int]]) -> list[Reply]:
        texts, starts = self._continued(prompts), [len(prompt) for prompt in prompts]
        lengths = [len(text) - start for text, start in zip(texts, starts, strict=True)]
        logits = torch.split(self.logits(texts, starts), lengths)
        for chat, each in zip(chats, logits, strict=True):
            if each.isnan().any():
                raise InputError(f"the model computes NaN in {self.model.dtype} for the prompt {shown(chat)}")
        return [Reply.of(*row) for row in zip(texts, starts, logits, strict=True)]

    def texts(self, replies: Sequence[Reply]) -> list[str]:
        """What the replies say, in words."""
        return [self.tokenizer.decode(reply.tokens[reply.start :], skip_special_tokens=True) for reply in replies]

    @torch.no_grad()
    def answers(self, replies: Sequence[Reply]) -> list[str]:
        """What the model, as it now stands, answers to the prompts of these replies, in words."""
        prompts = [reply.tokens[: reply.start].tolist() for reply in replies]
        answers: list[str] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            rows = [text[len(prompt) :] for prompt, text in zip(batch, self._continued(batch), strict=True)]
            answers += self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return answers

    @torch.no_grad()
    def continued(self, prompts: Sequence[list[int]], longest: int, **sampling: float) -> list[Tensor]:
        """Tokens of prompts, each followed by up to ``longest`` that the model says: greedily unless ``sampling``.

        ``sampling`` are transformers' own settings: ``temperature``, ``top_p``, ``top_k``. Draws come from torch's
        generator.
        """
        found: list[Tensor] = []
        for start in range(0, len(prompts), BATCH):
            found += self._continued_batch(prompts[start : start + BATCH], longest, sampling)
        return found

    def _continued(self, prompts: list[list[int]]) -> list[Tensor]:
        """Tokens of prompts, each followed by the model's greedy reply."""
        return self._continued_batch(prompts, self.longest_reply, {})

    def _continued_batch(
        self, prompts: Sequence[list[int]], longest_reply: int, sampling: Mapping[str, float]
    ) -> list[Tensor]:
        longest = max(map(len, prompts))
        pad = min(self.ends, default=0)  # a token that the model has, which its tokenizer's for padding need not be
        padded = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device
        )
        output = self.model.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=longest_reply,
            do_sample=bool(sampling),
            pad_token_id=pad,
            **sampling,
        )
        return [
            torch.cat([padded.new_tensor(prompt), _until_end(row[longest:], self.ends)])
            for prompt, row in zip(prompts, output, strict=True)
        ]

    def logits(self, texts: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        """Logits (tokens, vocabulary) of the tokens of all texts from their starts on, one text after the other."""
        places = [
            (row, position)
            for row, (text, start) in enumerate(zip(texts, starts, strict=True))
            for position in range(start - 1, len(text) - 1)
        ]
        return self._run(texts, places)

    def read(self, texts: Sequence[Tensor]) -> None:
        """Run the model on texts for what hooks see of it."""
        self._run(texts, [(0, 0)])

    def _run(self, texts: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
        """Logits (places, vocabulary) at places in a batch of texts, which are no longer than any of them."""
        padded = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)  # at the end, where no mask is needed
        rows, columns = torch.tensor(places, device=padded.device).unbind(1)
        chosen: list[bool] = []

        def choose(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
            if inputs[0].shape[:2] != padded.shape:
                return None
            chosen.append(True)
            at = inputs[0].device
            return inputs[0][rows.to(at), columns.to(at)][None]

        head = self.model.get_output_embeddings()
        with ExitStack() as stack:
            if head is not None:  # the logits of all other tokens, prompts and padding, are not even computed
                stack.callback(head.register_forward_pre_hook(choose).remove)
            if self._needs_plain_attention(padded.shape[1]):
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            logits: Tensor = self.model(input_ids=padded, use_cache=False).logits
        return logits[0] if chosen else logits[rows, columns]

    def _needs_plain_attention(self, longest: int) -> bool:
        is_half = self.model.dtype.itemsize == 2
        return torch.is_grad_enabled() and self.device.type == "cpu" and is_half and longest <= _PLAIN_ATTENTION


def _shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight as it is stored, before it was quantised."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(getattr(module, "weight", torch.empty(0)).shape)


class _Inputs:
    """The inputs of modules as their updates take them; modules that read the same tensor share one copy of it."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._version = 0
        self._copy = torch.empty(0)

    def of(self, source: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the input on a device, in a type: it may still be where the module before ran."""
        if source.is_inference():  # which may have changed in place without a trace
            return source.to(device, dtype)
        if source is not self._source or source._version != self._version or self._copy.device != device:
            self._source, self._version, self._copy = source, source._version, source.to(device, dtype)
        return self._copy


def _adding(factors: Factors, device: torch.device, shared: _Inputs) -> Any:
    b, a = (factor.to(device) for factor in factors)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (shared.of(inputs[0], device, a.dtype) @ a.T @ b.T).to(output)

    return hook


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return {end for end in ends if end is not None}


def _until_end(tokens: Tensor, ends: set[int]) -> Tensor:
    for position, token in enumerate(tokens.tolist(), 1):
        if token in ends:
            return tokens[:position]
    return tokens


@torch.no_grad()
def agreeing(language_model: LanguageModel, replies: Sequence[Reply]) -> list[bool]:
    """Return whether the model, as it now stands, would begin each reply with the same tokens, decoding greedily.

    They are those that the model of the reply finds likeliest when it reads the reply, as it is read here: in half
    precision, near-ties may have been decided otherwise when it was written, token by token.
    """
    agree = []
    for start in range(0, len(replies), BATCH):
        batch = replies[start : start + BATCH]
        texts = [reply.decisive for reply in batch]
        logits = language_model.logits(texts, [reply.start for reply in batch])
        lengths = [len(text) - reply.start for text, reply in zip(texts, batch, strict=True)]
        for reply, each in zip(batch, torch.split(logits, lengths), strict=True):
            wanted = each.gather(1, reply.outcomes[: len(each), :1])[:, 0]
            agree.append(bool((wanted >= each.amax(1)).all()))
    return agree
