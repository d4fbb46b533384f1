// Latents: the entries in their order, and the gradients of the weights.
#pragma once

#include "sparse_step.h"

template <class T>
void Step<T>::index(Member &m) {
    std::fill(m.starts.begin(), m.starts.end(), 0);
    for (auto &tile : m.tiles)
        for (auto &e : tile.entries) m.starts[e.latent + 1] += e.f != 0 || e.counted;
    for (int64_t i = 0; i < p.d_sae; i++) m.starts[i + 1] += m.starts[i];
    m.placed.resize(m.starts[p.d_sae]);
    std::vector<int32_t> at(m.starts.begin(), m.starts.end() - 1);
    int32_t living = int32_t(p.n_ends * p.rows);
    float *active = p.active + m.index * p.d_sae;
    std::fill(active, active + p.d_sae, 0.f);
    for (int64_t t = 0; t < n_tiles; t++) {
        Tile &tile = m.tiles[t];
        for (size_t r = 0; r + 1 < tile.starts.size(); r++)
            for (int32_t i = tile.starts[r]; i < tile.starts[r + 1]; i++) {
                Entry &e = tile.entries[i];
                if (e.f == 0 && !e.counted) continue;
                m.placed[at[e.latent]++] = {int32_t(t * tile_rows + r), e.source, e.f, e.slope, e.inside, e.counted};
                active[e.latent] += e.f != 0 && e.source < living;
            }
    }
}

template <class T>
void Step<T>::weights(Member &m, int64_t block, Scratch &s) {
    int64_t first = block * WIDTH, width = std::min<int64_t>(WIDTH, p.d_sae - first);
    float *columns_ = s.encoder.data(), slope[WIDTH] = {};
    std::fill(columns_, columns_ + WIDTH * p.d_in, 0.f);
    for (int64_t c = 0; c < width; c++) {
        int64_t i = first + c, at = m.index * p.d_sae + i;
        const Placed *e = m.placed.data() + m.starts[i];
        int count = m.starts[i + 1] - m.starts[i];
        float total = 0, inside = 0, in_window = 0;
        for (int j = 0; j < count; j++) total += e[j].slope, inside += e[j].inside, in_window += e[j].counted;
        slope[c] = p.d_b_enc[at] = total;
        if (p.d_inside) p.d_inside[at] = inside, p.n_inside[at] = in_window;
        float *atom = p.d_W_dec + at * p.d_out;
        std::fill(atom, atom + p.d_out, 0.f);
        add_rows(atom, p.d_out, m.errors.get(), p.d_out, e, count, [](const Placed &e) { return int64_t(e.source); },
               [](const Placed &e) { return e.f; });
        // tied: the encoder's gradient adds to the atom's
        add_rows(p.W_enc ? columns_ + c * p.d_in : atom, p.d_in, m.inputs.get(), depth, e, count,
               [](const Placed &e) { return int64_t(e.row); }, [](const Placed &e) { return e.slope; });
    }
    if (p.W_enc) {
        float *out = p.d_W_enc + m.index * p.d_in * p.d_sae + first;
        for (int64_t j = 0; j < p.d_in; j++)
            for (int64_t c = 0; c < width; c++) out[j * p.d_sae + c] = columns_[c * p.d_in + j];
    }
    if (p.subtracts) through_encoder(m, block, slope);
}

// What a block of latents sends back to b_dec through the encoder: - sum_i slope_i W_enc_i.
template <class T>
void Step<T>::through_encoder(Member &m, int64_t block, const float *slope) {
    constexpr int STEP = Panel<T>::STEP;
    const Element *panel = m.panels.get() + block * depth * WIDTH;
    for (int64_t j = 0; j < p.d_in; j++) {
        const Element *in = panel + j / STEP * STEP * WIDTH + j % STEP;
        float sum = 0;
        for (int c = 0; c < WIDTH; c++) sum += slope[c] * widen(in[c * STEP]);
        m.d_b_dec[block * p.d_in + j] = -sum;
    }
}

template <class T>
void Step<T>::finish(Member &m) {
    std::vector<double> sums(p.n_ends + 3, 0.0);
    float *out = p.d_b_dec ? p.d_b_dec + m.index * p.d_out : nullptr;
    if (out) std::fill(out, out + p.d_out, 0.f);
    for (auto &tile : m.tiles) {
        for (size_t i = 0; i < sums.size(); i++) sums[i] += tile.sums[i];
        for (int64_t j = 0; out && j < p.d_out; j++) out[j] += tile.d_b_dec[j];
    }
    for (int64_t b = 0; out && p.subtracts && b < blocks; b++)
        for (int64_t j = 0; j < p.d_out; j++) out[j] += m.d_b_dec[b * p.d_in + j];
    for (size_t i = 0; i < sums.size(); i++) p.sums[m.index * int64_t(sums.size()) + i] = sums[i];
}
