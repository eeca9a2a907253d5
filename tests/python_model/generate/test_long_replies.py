"""A reply that grows past the length where rotary frequencies change is the one that reading all of it anew gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import grit_kernels as gk
from python_model.generate.decode import Sampling, decode
from python_model.generate.states import TextStates
from tests.grit_kernels.hf.test_rope import LONG, tiny

NEW = 10


def anew(plain: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy, every token from a pass over the whole text with a module that remembers no earlier one."""
    ids = list(prompt)
    for _ in range(count):
        rotary = plain.model.rotary_emb
        plain.model.rotary_emb = type(rotary)(plain.config)
        ids.append(int(plain(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("kind", "scaling"), [("phi3", "longrope"), ("llama", "longrope"), ("llama", "dynamic")])
@pytest.mark.parametrize("lengths", [(LONG - 3, 5), (LONG + 4, LONG), (LONG - NEW + 1, LONG - NEW + 2)], ids=str)
def test_replies_are_those_of_passes_over_the_whole_text(kind: str, scaling: str, lengths: tuple[int, ...]) -> None:
    plain, model = tiny(kind, scaling), gk.patch(tiny(kind, scaling))
    draw = random.Random(9)  # one whose replies differ when keys of other frequencies stay
    prompts = [[draw.randrange(3, 97) for _ in range(n)] for n in lengths]
    expected = [anew(plain, prompt, NEW) for prompt in prompts]
    heard: list[list[int]] = [[] for _ in prompts]

    def listen(row: int, token: int) -> bool:
        heard[row].append(token)
        return False

    assert decode(model, prompts, max_new_tokens=NEW, eos_token_ids=[], on_token=listen) == expected == heard
    # an end after the change, by EOS and by the listener
    end = expected[0][6]
    first = expected[0].index(end)
    assert decode(model, prompts[:1], max_new_tokens=NEW, eos_token_ids=[end]) == [expected[0][:first]]
    stopped = decode(model, prompts[:1], max_new_tokens=NEW, eos_token_ids=[], on_token=lambda _, token: token == end)
    assert stopped == [expected[0][: first + 1]]
    least = decode(model, prompts[:1], max_new_tokens=NEW, eos_token_ids=[expected[0][0]], min_new_tokens=1)
    assert least[0] and least[0][0] != expected[0][0]


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_penalties_know_the_reply_from_before_the_frequencies_changed(scaling: str) -> None:
    plain, model = tiny("llama", scaling), gk.patch(tiny("llama", scaling))
    prompt = [random.Random(9).randrange(3, 97) for _ in range(LONG - 4)]
    sampling = Sampling(presence_penalty=2.0)
    (found,) = decode(model, [prompt], max_new_tokens=NEW, eos_token_ids=[], sampling=sampling)
    for count, token in enumerate(found):
        rotary = plain.model.rotary_emb
        plain.model.rotary_emb = type(rotary)(plain.config)
        logits = plain(torch.tensor([prompt + found[:count]]), use_cache=False).logits[0, -1]
        assert token == int(sampling.choose(logits[None], None, [found[:count]])[0])


@pytest.mark.parametrize(("stored", "prompt", "refused"), [(8, 4, True), (4, 3, False), (LONG + 1, 3, False)])
def test_states_read_with_other_frequencies_than_the_reply_needs_are_refused(
    stored: int, prompt: int, refused: bool
) -> None:
    model = gk.patch(tiny("llama", "longrope"))
    ids = list(range(3, 3 + stored + prompt))
    cache = gk.hf.new_cache()
    model(torch.tensor([ids[:stored]]), **gk.hf.cache_keyword(model, cache))
    kept = torch.stack([torch.stack(pair)[:, 0] for pair in gk.hf.cached_states(cache)])
    states = TextStates(kept, torch.tensor(ids[:stored]), torch.arange(stored), True)
    if refused:
        with pytest.raises(ValueError, match="states: expected room for the prompt and the reply below 16 tokens"):
            decode(model, [ids[stored:]], states=[states], max_new_tokens=6, eos_token_ids=[])
        return
    found = decode(model, [ids[stored:]], states=[states], max_new_tokens=6, eos_token_ids=[])
    expected = [anew(tiny("llama", "longrope"), ids, 6)]
    assert found == expected
    # beside a text that is read again where its frequencies change
    grown = list(range(40, 40 + LONG - 3))
    heard: list[list[int]] = [[], []]

    def listen(row: int, token: int) -> bool:
        heard[row].append(token)
        return False

    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_ids": [], "on_token": listen}
    found = decode(model, [grown, ids[stored:]], states=[None, states], **options)
    assert found == heard == [anew(tiny("llama", "longrope"), grown, 6), *expected]
