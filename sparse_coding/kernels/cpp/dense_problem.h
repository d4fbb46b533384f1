// What dense_native.py hands over; pointers to contiguous tensors, null where there is none.
#pragma once

#include <cstdint>

struct DenseProblem {
    int64_t members, rows, d_in, d_out, d_sae, threads;
    int64_t half, subtracts, frozen;  // frozen: the auxiliary error does not train the decoder
    double error_weight;              // of each row
    const float *x, *target;          // [B d_in] [B d_out]
    const float *W_enc, *b_enc, *W_dec, *b_dec, *b_mag, *r_mag;  // b_mag and r_mag: gated, b_enc is b_gate
    const float *penalty;                                        // [M d_sae], of each unit of each row
    float *d_W_enc, *d_b_enc, *d_W_dec, *d_b_dec, *d_b_mag, *d_r_mag;
    float *active, *codes, *gates;  // [M d_sae], sums over rows: f > 0, f, open gates
    double *sums;                   // [M 2], summed over rows: squared error, that of the open gates
};
