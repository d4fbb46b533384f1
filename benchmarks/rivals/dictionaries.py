"""Every architecture and loss term beside the rivals': same weights, same rows -> losses, terms and gradients.

    python benchmarks/rivals/dictionaries.py saelens                in an environment with sae-lens
    python benchmarks/rivals/dictionaries.py sparsify                                     eai-sparsify
    python benchmarks/rivals/dictionaries.py dictionary_learning                          dictionary-learning
    python benchmarks/rivals/dictionaries.py ghost FOLDER           with sae-lens's requirements; FOLDER is a clone of
                                                    github.com/decoderesearch/SAELens at 6754e650 (February 2024)
    python benchmarks/rivals/dictionaries.py save FOLDER            in ours: writes dictionaries for SAELens
    python benchmarks/rivals/dictionaries.py open FOLDER            in an environment with sae-lens: reads them

The first four ask the rival's own code (rival_saelens.py, ...) and leave its answers with the tests, which hold ours
against them within 1e-5 in float32: tests/dictionaries/test_against_rivals.py. Our package need not be there for that.
The last two do the same for inference, codes and reconstructions, and leave nothing.

Conventions, and where a rival differs (SL SAELens 6.54, SP sparsify 1.3, DL dictionary_learning 0.1):

    error           sum over dims, mean over rows: ours, SL, DL. SP: FVU of the batch, our error "fvu"
    L1              on f: DL standard, our relu. On f ||W_dec_i||: SL standard, DL April, our relu-april
    Lp              SL: the norm (our form "norm") of f ||W_dec_i||, so its gradient has a part along the atoms that
                    ours has not, and that a unit atom drops. DL: the norm, or the sum with sparsity_function "Lp^p"
    p-annealing     DL changes p after the steps `linspace(anneal_start, anneal_end)`, ours in equal stages: the same
                    where the stages are; the weight is adapted from the same ten steps
    gated           DL freezes the decoder in the auxiliary term, SL trains it: our frozen_auxiliary. L1 in SL counts
                    norms, as ours does where the decoder is free
    TopK, free      SL's codes carry ||W_dec_i||, and its decoder divides by it: x_hat is ours, f is ours times the norm
    TopK, SP        its backward pass gives a latent that is kept at 0 a gradient that ReLU would stop: not compared
    AuxK            ours and SL: times min(n_dead / k_aux, 1). SP: that over the variance of the target. DL: over the
                    variance of the residual, without the factor; and a latent kept in this very batch is not dead.
                    SL does not rectify; the paper and all others do: pre-activations of dead latents are positive here
    AuxK, SP        WRONG: its encoder drops the gradient of pre-activations, so AuxK (and Multi-TopK) reach the decoder
                    alone. Compared: the decoder; and that W_enc, b_enc, b_dec miss exactly that part
    Multi-TopK, SP  FVU with 4k latents, / 8, as ours. Not compared: it leaves out the skip connection of a transcoder,
                    and takes the 4k largest where GroupMax would take the best of 4k groups, as ours does
    BatchTopK       the threshold in SL is averaged from 0 on: after n batches (1 - 0.99^n) times ours. DL: the first
                    as ours, later ones with decay 0.999
    Matryoshka      the sum over prefixes: ours, SL. DL divides by their number twice, but not AuxK
    JumpReLU        SL step, tanh: ours l0, tanh. SL quadratic: (2 / T) (L0 - T)^2 of each row; ours and DL:
                    (L0 / T - 1)^2 of the mean L0 of the batch. The same up to 2 T for a single row, which is compared
    JumpReLU, DL    WRONG: counts f > threshold, so rows just below the threshold do not move it. Compared: all else,
                    and that what L0 does to a threshold is ours times the share of its window that lies above it
    ghost gradients the term alone: the error beside it is divided by norms in the source, and is not in ours
    unit atoms      SL does not hold them. DL drops the parallel part of the gradient as we do (TopK family)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

RIVALS = ("saelens", "sparsify", "dictionary_learning")


def main(arguments: list[str]) -> None:
    match arguments:
        case [rival] if rival in RIVALS:
            importlib.import_module(f"rival_{rival}").record()
        case ["ghost", folder]:
            importlib.import_module("rival_ghost").record(Path(folder))
        case ["save", folder]:
            importlib.import_module("rival_exports").save(Path(folder))
        case ["open", folder]:
            read = importlib.import_module("rival_saelens").read
            for one in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
                print(f"{one.name:32s} {read(one)}")
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
