// What sparse.py hands over; pointers to contiguous tensors, null where there is none.
#pragma once

#include <cstdint>

enum Rule : int64_t { TOPK = 0, BATCH = 1, ABOVE = 2 };
enum Phase { PACK, PRODUCT, CHOOSE, RECONSTRUCT, INDEX, WEIGHTS, PHASES };

struct Problem {
    int64_t members, rows, d_in, d_out, d_sae, n_ends, k_aux, threads;
    int64_t rule, half, subtracts, is_signed, norm_error;
    double densest, error_weight;  // error_weight: of each row
    const float *x, *target;       // [B d_in] [B d_out]
    const float *W_enc, *b_enc, *W_dec, *b_dec;
    const int64_t *k, *ends;                       // [M] (of a row, or of the whole batch) [n_ends]
    const float *norms, *threshold, *window;       // [M d_sae] [M d_sae] [M]
    const float *penalty, *aux_weight;             // [M] [M], the weights of each row
    const uint8_t *dead;                           // [M d_sae]
    uint8_t *left;  // [M]: members to leave out; set for those of which more is active than `densest` allows
    float *d_W_enc, *d_b_enc, *d_W_dec, *d_b_dec;  // like the parameters
    float *active, *d_inside, *n_inside;           // [M d_sae]
    float *smallest;                               // [M]
    double *sums;     // [M n_ends + 3]: errors of each prefix, squared error, AuxK, L1, summed over rows
    double *seconds;  // [PHASES], added to: processor time of all threads
};
