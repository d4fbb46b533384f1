// Rows: x_hat, its error, and d loss / d f of each entry.
#pragma once

#include "sparse_step.h"

static void add_atoms(float *sum, const float *W, int64_t d, const Entry *e, int count) {
    add_rows(sum, d, W, d, e, count, [](const Entry &e) { return int64_t(e.latent); },
             [](const Entry &e) { return e.f; });
}

template <class T>
void Step<T>::reconstruct(Member &m, int64_t t, Scratch &s) {
    Tile &tile = m.tiles[t];
    int64_t d = p.d_out, n_rows = int64_t(tile.starts.size()) - 1;
    tile.sums.assign(p.n_ends + 3, 0.0);
    tile.d_b_dec.assign(d, 0.f);
    for (int64_t r = 0; r < n_rows; r++) {
        Entry *e = tile.entries.data() + tile.starts[r], *dead = tile.entries.data() + tile.aux_starts[r];
        int count = int(dead - e);
        if (p.rule == BATCH) {  // those above the floor that are not kept after all go to the end, as zeros
            Entry *kept = std::stable_partition(e, dead, [&](const Entry &e) { return !(e.inside < m.last); });
            for (Entry *left = kept; left < dead; left++) left->f = 0;
            count = int(kept - e);
        }
        for (int i = 0; i < count; i++) tile.sums[p.n_ends + 2] += std::fabs(e[i].f);
        row(m, t * tile_rows + r, e, count, tile, s);
        if (!m.dead.empty()) revive(m, t * tile_rows + r, dead, tile.starts[r + 1] - tile.aux_starts[r], tile, s);
    }
}

template <class T>
void Step<T>::row(Member &m, int64_t b, Entry *e, int count, Tile &tile, Scratch &s) {
    int64_t d = p.d_out;
    const float *W = W_dec(m), *bias = b_dec(m), *target = p.target + b * d;
    float *error = s.error.data();
    for (int64_t j = 0; j < d; j++) error[j] = (bias ? bias[j] : 0.f) - target[j];
    int done = 0;
    double squared = 0;
    int32_t *source = s.ends.data();
    for (int64_t g = 0; g < p.n_ends; g++) {
        int end = done;
        while (end < count && e[end].latent < p.ends[g]) e[end++].source = int32_t(g * p.rows + b);
        source[g] = done;
        add_atoms(error, W, d, e + done, end - done);
        done = end;
        squared = squared_length(error, d);
        double size = std::sqrt(squared);
        tile.sums[g] += p.norm_error ? size : squared;
        float scale = p.norm_error ? float(size > 0 ? p.error_weight / size : 0) : 2 * p.error_weight;
        for (int64_t j = 0; j < d; j++) s.suffix[g * d + j] = scale * error[j];
    }
    tile.sums[p.n_ends] += squared;
    for (int64_t g = p.n_ends - 1; g >= 0; g--) {
        float *own = &s.suffix[g * d];
        if (g + 1 < p.n_ends)
            for (int64_t j = 0; j < d; j++) own[j] += own[d + j];
        int end = g + 1 < p.n_ends ? source[g + 1] : count;
        slopes(own, W, e + source[g], end - source[g], p.penalty ? p.penalty[m.index] : 0);
        T *kept = m.errors.get() + (g * p.rows + b) * d;
        for (int64_t j = 0; j < d; j++) narrow(own[j], kept[j]);
    }
    for (int64_t j = 0; j < d; j++) tile.d_b_dec[j] += s.suffix[j];
}

// AuxK: the dead latents' share of the row, fitted to what the living ones leave.
template <class T>
void Step<T>::revive(Member &m, int64_t b, Entry *e, int count, Tile &tile, Scratch &s) {
    int64_t d = p.d_out;
    float *fit = s.fits.data();
    std::copy(s.error.begin(), s.error.end(), fit);  // x_hat - target: what is left, the other way round
    add_atoms(fit, W_dec(m), d, e, count);
    tile.sums[p.n_ends + 1] += squared_length(fit, d);
    float scale = 2 * p.aux_weight[m.index];
    T *kept = m.errors.get() + (p.n_ends * p.rows + b) * d;
    for (int64_t j = 0; j < d; j++) {
        fit[j] *= scale;
        narrow(fit[j], kept[j]);
    }
    for (int i = 0; i < count; i++) e[i].source = int32_t(p.n_ends * p.rows + b);
    slopes(fit, W_dec(m), e, count, 0);
}

// d loss / d f of entries whose x_hat has the gradient `error`.
template <class T>
void Step<T>::slopes(const float *error, const float *W, Entry *e, int count, float penalty) const {
    int64_t d = p.d_out;
    for (int i = 0; i < count; i++) {
        const float *atom = W + e[i].latent * d;
        float dot = 0;
        for (int64_t j = 0; j < d; j++) dot += error[j] * atom[j];
        dot += penalty;
        e[i].inside = e[i].counted ? dot : 0;
        e[i].slope = e[i].f != 0 ? dot : 0;
    }
}
