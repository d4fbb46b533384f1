// One training step of a stack of sparse dictionaries: see sparse.py, which calls it and says what it computes.
//
// Phases, each shared out over the threads in pieces whose results do not depend on who takes them:
//   pack         the encoder into panels, rounded to the precision of the products
//   probe        a few rows: is too much active, the member is left to others
//   encode       a tile of rows at a time: pre-activations, which stay in cache, and the entries that are kept of them
//   reconstruct  row by row: x_hat, its error, the gradient of each kept code
//   index        the entries once more, latent by latent, by a counting sort
//   weights      latent by latent: the gradients of its encoder column and its atom
// Nothing of size [B d_sae] or [B k d] is ever stored.

#include <new>

#include "sparse_encode.h"
#include "sparse_reconstruct.h"
#include "sparse_weights.h"

// 0: done, but for members that are marked as left. 2: no memory.
extern "C" int sparse_step(const Problem *p) {
    try {
        p->half ? Step<bf16>(*p).run() : Step<float>(*p).run();
        return 0;
    } catch (const std::bad_alloc &) {
        return 2;
    }
}
