from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from sparse_coding.dictionaries import ReLU, ReLUSettings
from sparse_coding.errors import UserError
from sparse_coding.metrics import behaviour, judged_positions, kl_sum, next_token_losses, reconstruct_with

VOCABULARY, WIDTH = 11, 6
KEYS = {
    *("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "kl_zero", "kl_mean"),
    *("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"),
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model:
    """Logits = site @ U + bias with site = E[token] + position; counts how often it runs."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.embed, self.unembed = gaussian(VOCABULARY, WIDTH), gaussian(WIDTH, VOCABULARY, seed=1)
        self.bias, self.position = gaussian(VOCABULARY, seed=2), 0.1 * gaussian(64, WIDTH, seed=3)
        self.dtype, self.runs = dtype, 0

    def site(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.embed[tokens] + self.position[: tokens.shape[1]]).to(self.dtype)

    def __call__(self, tokens, change, attention=None):
        self.runs += 1
        site = self.site(tokens)
        if attention is not None:  # a crude attention: the mean of what may be seen
            seen = attention[..., None].float()
            site = site + (site * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        if change is not None:
            changed = change(site)
            assert (changed.shape, changed.dtype) == (site.shape, site.dtype)
            site = changed
        return site.float() @ self.unembed + self.bias


def text(rows: int = 8, length: int = 10, seed: int = 4) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + 0.5 * torch.sin(7 * x)


def test_positions_count_when_they_and_their_next_token_are_real():
    tokens = text(2, 4)
    assert judged_positions(tokens).tolist() == [[True, True, True, False]] * 2
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]])
    assert judged_positions(tokens, mask).tolist() == [[True, True, False, False], [False] * 4]
    assert judged_positions(tokens, mask, "masked").tolist() == mask.bool().tolist()


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    total, count = next_token_losses(torch.zeros(2, 5, VOCABULARY), text(2, 5))
    assert count == 8
    assert total == pytest.approx(8 * math.log(VOCABULARY), rel=1e-6)


def test_a_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, 9.0]]])
    total, count = next_token_losses(logits, torch.tensor([[0, 1, 1]]))
    assert (total, count) == (pytest.approx(-math.log(3 / 4) - math.log(1 / 5)), 2)


def test_losses_equal_torch_and_do_not_see_masked_tokens():
    logits, tokens = gaussian(3, 6, VOCABULARY), text(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    wanted = F.cross_entropy(logits[0, :3], tokens[0, 1:4], reduction="sum")
    wanted = wanted + F.cross_entropy(logits[1, :5], tokens[1, 1:], reduction="sum")
    total, count = next_token_losses(logits, tokens, mask)
    assert (total, count) == (pytest.approx(wanted.item(), rel=1e-6), 8)
    spoiled = torch.where(mask, tokens, 0), torch.where(mask[..., None], logits, math.nan)
    assert next_token_losses(spoiled[1], spoiled[0], mask) == (total, count)


def test_kl_equals_its_definition_and_is_from_clean_to_spliced():
    clean, spliced = gaussian(2, 5, VOCABULARY), gaussian(2, 5, VOCABULARY, seed=1)
    judged = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)) > 0.4
    p, q = clean.double().softmax(-1), spliced.double().softmax(-1)
    wanted = (p * (p / q).log()).sum(-1)[judged].sum().item()
    total, count = kl_sum(clean, spliced, judged)
    assert (total, count) == (pytest.approx(wanted, rel=1e-5), int(judged.sum()))
    assert kl_sum(spliced, clean, judged)[0] != pytest.approx(wanted, rel=0.01)
    assert kl_sum(clean, clean + 3, judged)[0] == pytest.approx(0.0, abs=1e-5)
    assert kl_sum(clean, clean, judged)[0] == 0.0


def test_kl_of_two_coins_by_hand():
    clean, spliced = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3.0), 0.0]]])
    total, _ = kl_sum(clean, spliced, torch.ones(1, 1, dtype=torch.bool))
    assert total == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def test_tokens_a_model_excludes_with_minus_infinity_add_nothing_to_kl():
    clean, spliced = gaussian(1, 3, 5), gaussian(1, 3, 5, seed=1)
    judged = torch.ones(1, 3, dtype=torch.bool)
    excluded = torch.full((1, 3, 2), -math.inf)
    total, _ = kl_sum(torch.cat([clean, excluded], -1), torch.cat([spliced, excluded], -1), judged)
    assert total == pytest.approx(kl_sum(clean, spliced, judged)[0], rel=1e-6)


def test_behaviour_equals_the_formulas_evaluated_directly():
    model, tokens, mean = Model(), text(), gaussian(WIDTH, seed=5)
    found = behaviour(model, tokens.split(3), {"noisy": noisy}, mean)["noisy"]

    def ce(logits):
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)).item()

    def kl(logits):
        p, q = (t[:, :-1].double().log_softmax(-1) for t in (model(tokens, None), logits))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    zero, ablated = model(tokens, torch.zeros_like), model(tokens, lambda x: mean.expand_as(x))
    clean, spliced = model(tokens, None), model(tokens, noisy)
    assert set(found) == KEYS
    assert found == pytest.approx(
        {
            "ce_clean": ce(clean),
            "ce_spliced": ce(spliced),
            "ce_zero": ce(zero),
            "ce_mean": ce(ablated),
            "kl_spliced": kl(spliced),
            "kl_zero": kl(zero),
            "kl_mean": kl(ablated),
            "ce_recovered_zero": (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean)),
            "ce_recovered_mean": (ce(ablated) - ce(spliced)) / (ce(ablated) - ce(clean)),
            "kl_recovered_zero": 1 - kl(spliced) / kl(zero),
            "kl_recovered_mean": 1 - kl(spliced) / kl(ablated),
        },
        rel=1e-4,
    )


def test_perfect_reconstruction_recovers_all_and_each_ablation_recovers_none_of_itself():
    mean = gaussian(WIDTH, seed=5)
    changes = {
        "same": lambda x: x,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
        "bad": lambda x: -9 * x,
    }
    found = behaviour(Model(), [text()], changes, mean)
    for share in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"):
        assert found["same"][share] == 1.0
    assert found["same"]["kl_spliced"] == 0.0
    assert (found["zero"]["ce_recovered_zero"], found["zero"]["kl_recovered_zero"]) == (0.0, 0.0)
    assert (found["mean"]["ce_recovered_mean"], found["mean"]["kl_recovered_mean"]) == (0.0, 0.0)
    assert (found["bad"]["kl_recovered_zero"] or 0) < -1  # not clipped


def test_padding_and_the_cut_into_batches_do_not_matter():
    tokens, mean = text(), gaussian(WIDTH, seed=5)
    lengths = torch.tensor([10, 9, 5, 2, 1, 7, 10, 3])
    mask = torch.arange(10) < lengths[:, None]
    whole = behaviour(Model(), [(tokens, mask)], {"noisy": noisy}, mean)["noisy"]
    singles = [(row[None, :length], None) for row, length in zip(tokens, lengths.tolist(), strict=True)]
    assert behaviour(Model(), singles, {"noisy": noisy}, mean)["noisy"] == pytest.approx(whole, rel=1e-5)
    spoiled = torch.where(mask, tokens, 0)
    assert behaviour(Model(), [(spoiled, mask)], {"noisy": noisy}, mean)["noisy"] == whole


def test_masked_tokens_keep_their_activations():
    tokens, mask = text(2, 5), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    changed = []

    def run(tokens, change):
        site = gaussian(2, 5, WIDTH)
        if change is not None:
            changed.append(change(site) != site)
        return site @ gaussian(WIDTH, VOCABULARY)

    behaviour(run, [(tokens, mask)], {"noisy": noisy}, torch.ones(WIDTH))
    assert len(changed) == 3
    for one in changed:
        assert torch.equal(one, mask.bool()[..., None].expand_as(one))


def test_the_attention_mask_reaches_the_model():
    tokens, mask, mean = text(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), torch.ones(WIDTH)
    padded = behaviour(Model(), [(tokens, mask, mask)], {"noisy": noisy}, mean)["noisy"]
    rows = [(tokens[:1], None, mask[:1]), (tokens[1:, :3], None, mask[1:, :3])]
    assert behaviour(Model(), rows, {"noisy": noisy}, mean)["noisy"] == pytest.approx(padded, rel=1e-5)
    without = behaviour(Model(), [(tokens, mask, None)], {"noisy": noisy}, mean)["noisy"]
    assert without["ce_clean"] != pytest.approx(padded["ce_clean"], rel=1e-3)


def test_clean_zero_and_mean_run_once_per_batch_for_all_dictionaries():
    model = Model()
    found = behaviour(model, text().split(4), {str(i): noisy for i in range(5)}, torch.zeros(WIDTH))
    assert model.runs == 2 * (3 + 5)
    assert all(one == found["0"] for one in found.values())


def test_a_site_the_model_ignores_leaves_nothing_to_recover():
    model = Model()
    model.unembed.zero_()
    found = behaviour(model, [text()], {"noisy": noisy}, torch.ones(WIDTH))["noisy"]
    for name in KEYS:
        assert (found[name] is None) == ("recovered" in name)
    json.dumps(found, allow_nan=False)


def test_a_diverged_dictionary_gives_none_and_json_takes_it():
    found = behaviour(Model(), [text()], {"nan": lambda x: x * math.nan, "noisy": noisy}, torch.ones(WIDTH))
    assert (found["nan"]["ce_spliced"], found["nan"]["kl_recovered_zero"]) == (None, None)
    assert found["noisy"]["ce_spliced"] is not None
    json.dumps(found, allow_nan=False)


def test_masked_models_are_judged_by_kl_alone_at_every_real_token():
    tokens, mean = text(2, 5), torch.ones(WIDTH)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    model = Model()
    found = behaviour(model, [(tokens, mask)], {"noisy": noisy}, mean, kind="masked")["noisy"]
    total, count = kl_sum(model(tokens, None), model(tokens, noisy), mask)
    assert (found["kl_spliced"], count) == (pytest.approx(total / 7, rel=1e-6), 7)
    assert found["kl_recovered_mean"] is not None
    assert {name for name in KEYS if found[name] is None} == {name for name in KEYS if name.startswith("ce_")}


def test_mistakes_are_named():
    with pytest.raises(UserError, match="two real tokens"):
        behaviour(Model(), [text(3, 1)], {"noisy": noisy}, torch.zeros(WIDTH))
    with pytest.raises(UserError, match="causal, masked"):
        behaviour(Model(), [text()], {}, torch.zeros(WIDTH), kind="seq2seq")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one value per token"):
        judged_positions(text(2, 4), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dictionary_is_put_in_place_at_the_scale_it_was_trained_at(dtype):
    settings = ReLUSettings(WIDTH, 9)
    parameters = ReLU.initial(settings, torch.Generator().manual_seed(0))
    parameters["b_enc"] = gaussian(9, seed=6)  # so that the dictionary does not commute with scaling
    dictionary = ReLU.single(settings, parameters)
    x = gaussian(2, 5, WIDTH).to(dtype)
    replaced = reconstruct_with(dictionary, scale=4.0)(x)
    assert (replaced.shape, replaced.dtype) == (x.shape, dtype)
    wanted = torch.stack([dictionary(row.float() * 4) / 4 for row in x.reshape(-1, 1, WIDTH)]).reshape(x.shape)
    torch.testing.assert_close(replaced, wanted.to(dtype))
    assert not torch.allclose(replaced, reconstruct_with(dictionary)(x))
    behaviour(Model(dtype), [text()], {"dictionary": reconstruct_with(dictionary, 4.0)}, torch.zeros(WIDTH))
