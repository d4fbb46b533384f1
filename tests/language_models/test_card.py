"""What a trained model says."""

from __future__ import annotations

import torch

from sparse_coding.language_models import card
from tests.language_models.tiny import PERIOD, trainer


def test_samples_continue_the_text_within_the_context_and_follow_the_seed():
    made = trainer()
    for i in range(20):
        made.update(i)
    made.model.eval()
    prompt = torch.from_numpy(PERIOD[:6])
    drawn = [card.sample(made.model, prompt, new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0][:6], prompt)
    assert len(drawn[0]) == 18
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    limited = card.sample(made.model, prompt, new_tokens=50, seed=1, vocab_size=3)
    assert set(limited[6:].tolist()) <= {0, 1, 2}
