from __future__ import annotations

import torch

from sparse_coding.dictionaries import ReLU, ReLUSettings
from sparse_coding.latents import LEAST_FIRINGS, choose_latents, top_contexts

CONTEXTS, LENGTH = 12, 10
PLACES = torch.cartesian_prod(torch.arange(CONTEXTS), torch.arange(LENGTH))
WORDS = [[f"w{c}.{p}" for p in range(LENGTH)] for c in range(CONTEXTS)]


def identity_dictionary(d: int) -> ReLU:
    """Latent i is dimension i."""
    weights = {"W_enc": torch.eye(d), "b_enc": torch.zeros(d), "W_dec": torch.eye(d)}
    return ReLU.single(ReLUSettings(d, d, decoder_bias=False), weights)


def test_the_most_active_contexts_are_found_with_their_activations():
    x = torch.zeros(CONTEXTS * LENGTH, 2)
    code = x[:, 0].view(CONTEXTS, LENGTH)
    code[3, 5], code[3, 6], code[7, 0], code[1, 9], code[0, 0], code[11, 4] = 9.0, 4.0, 8.0, 1.0, 0.5, 2.0
    (latent,) = top_contexts(identity_dictionary(2), x, PLACES, WORDS, n_latents=5, n_contexts=3, chunk=7)
    assert latent["index"] == 0  # the other one never fires and is not listed
    assert latent["max_activation"] == 9.0
    assert latent["density"] == 6 / 120
    tops = [max(context["activations"]) for context in latent["contexts"]]
    assert tops == [9.0, 8.0, 2.0]
    first = latent["contexts"][0]
    assert first["tokens"] == WORDS[3]
    assert first["activations"][5:7] == [9.0, 4.0]
    assert sum(first["activations"]) == 13.0


def test_rows_that_do_not_count_leave_gaps_but_no_shift():
    kept = PLACES[:, 1] != 4
    x = torch.zeros(CONTEXTS * LENGTH, 1)
    x.view(CONTEXTS, LENGTH)[:, 5] = torch.arange(1.0, CONTEXTS + 1)
    (latent,) = top_contexts(identity_dictionary(1), x[kept], PLACES[kept], WORDS, n_latents=1, n_contexts=1)
    shown = latent["contexts"][0]
    assert shown["tokens"][shown["activations"].index(12.0)] == "w11.5"


def test_latents_are_spread_over_the_firing_rates():
    counts = torch.arange(0.0, 100.0)
    chosen = choose_latents(counts, 5)
    assert chosen[0] == LEAST_FIRINGS
    assert chosen[-1] == 99
    assert chosen == sorted(chosen)
    assert choose_latents(counts[:8], 5) == [5, 6, 7]
    assert choose_latents(torch.zeros(10), 5) == []


def test_a_dictionary_without_active_latents_lists_none():
    x = torch.zeros(CONTEXTS * LENGTH, 2)
    assert top_contexts(identity_dictionary(2), x, PLACES, WORDS, n_latents=5) == []
