// Rows: pre-activations of a tile, and the entries that are kept of them.
#pragma once

#include "sparse_step.h"

// Row `b` as the encoder reads it.
template <class T>
void Step<T>::centre(const Member &m, int64_t b, T *out) const {
    const float *shift = p.subtracts ? b_dec(m) : nullptr, *x = p.x + b * p.d_in;
    for (int64_t j = 0; j < p.d_in; j++) narrow(shift ? x[j] - shift[j] : x[j], out[j]);
    for (int64_t j = p.d_in; j < depth; j++) narrow(0.f, out[j]);
}

template <class T>
void Step<T>::pre_activations(const Member &m, const T *inputs, int64_t rows, Scratch &s) const {
    for (int64_t b = 0; b < blocks; b++)
        product(inputs, depth, int(rows), m.panels.get() + b * depth * WIDTH, int(depth), &s.pre[b * WIDTH], columns,
                &m.bias[b * WIDTH]);
}

// Pre-activations of rows from all over the batch.
template <class T>
void Step<T>::sample(const Member &m, int64_t rows, Scratch &s) const {
    std::unique_ptr<T[]> inputs(new T[rows * depth]);
    for (int64_t r = 0; r < rows; r++) centre(m, r * p.rows / rows, inputs.get() + r * depth);
    pre_activations(m, inputs.get(), rows, s);
    spent(s, PRODUCT);
}

// Whether a few rows hold so much more than is allowed that the batch will.
template <class T>
void Step<T>::probe(Member &m, Scratch &s) {
    int64_t rows = std::min<int64_t>(2 * ROWS, p.rows);
    sample(m, rows, s);
    Tile &tile = m.tiles[0];
    tile.entries.clear();
    for (int64_t r = 0; r < rows; r++) select(m, &s.pre[r * columns], tile, s);
    if (double(tile.entries.size()) > SLACK * p.densest * double(rows * p.d_sae)) dense[m.index].store(true);
}

// A score that about MARGIN times as many as are to be kept are above, from a sample of rows.
template <class T>
void Step<T>::guess(Member &m, Scratch &s) {
    int64_t rows = std::min<int64_t>(tile_rows, p.rows);
    sample(m, rows, s);
    const float *norms = p.norms ? p.norms + m.index * p.d_sae : nullptr;
    for (int64_t i = 0; i < rows * columns; i++) {
        float &pre = s.pre[i];
        if (norms && i % columns < p.d_sae) pre *= norms[i % columns];
        if (!(pre > 0)) pre = 0;  // NaN too
    }
    int64_t k = int64_t(MARGIN * double(p.k[m.index]) * rows / p.rows) + 1;
    int count = int(rows * columns);
    m.floor = k < count ? kth_largest(s.pre.data(), count, int(k), s.room.data(), s.places.data()) : 0;
}

template <class T>
void Step<T>::encode(Member &m, int64_t t, Scratch &s) {
    int64_t first = t * tile_rows, rows = std::min<int64_t>(tile_rows, p.rows - first);
    T *inputs = m.inputs.get() + first * depth;
    for (int64_t r = 0; r < rows; r++) centre(m, first + r, inputs + r * depth);
    pre_activations(m, inputs, rows, s);
    spent(s, PRODUCT);
    Tile &tile = m.tiles[t];
    tile.entries.clear();
    tile.starts.assign(1, 0);
    tile.aux_starts.clear();
    size_t most = size_t(p.densest * double(rows * p.d_sae)) + 1;
    for (int64_t r = 0; r < rows; r++) {
        select(m, &s.pre[r * columns], tile, s);
        if (tile.entries.size() > most) {
            dense[m.index].store(true);
            return;
        }
        tile.aux_starts.push_back(int32_t(tile.entries.size()));
        if (!m.dead.empty()) select_dead(m, &s.pre[r * columns], tile, s);
        tile.starts.push_back(int32_t(tile.entries.size()));
    }
    spent(s, CHOOSE);
}

template <class T>
void Step<T>::select(const Member &m, const float *pre, Tile &tile, Scratch &s) {
    int n = int(p.d_sae), count = 0;
    int32_t *places = s.places.data();
    if (p.rule == ABOVE) {
        const float *threshold = p.threshold ? p.threshold + m.index * p.d_sae : nullptr;
        float half = p.window ? p.window[m.index] / 2 : 0;
        const float *low = pre;
        if (threshold) {  // below neither the threshold nor the window around it
            for (int i = 0; i < n; i++) s.score[i] = pre[i] - threshold[i] + half;
            low = s.score.data();
        }
        count = positions(low, n, 0, half == 0, places);
        Entry *out = room_for(tile, count);
        for (int i = 0; i < count; i++) {
            int32_t at = places[i];
            float limit = threshold ? threshold[at] : 0;
            bool active = threshold ? pre[at] > limit : !(pre[at] <= 0);
            bool inside = half > 0 && std::fabs(pre[at] - limit) < half;
            *out = {at, 0, active ? pre[at] : 0.f, 0, 0, inside};
            out += active || inside;
        }
        fill(tile, out);
        return;
    }
    const float *score = scores(m, pre, s);
    bool batch = p.rule == BATCH;
    count = batch ? positions(score, n, m.floor, m.floor <= 0, places)
                  : largest(score, n, int(p.k[m.index]), s.room.data(), places);
    Entry *out = room_for(tile, count);
    for (int i = 0; i < count; i++) {
        int32_t at = places[i];
        *out = {at, 0, pre[at], 0, score[at], 0};
        out += p.is_signed ? pre[at] != 0 : !(pre[at] <= 0);
    }
    fill(tile, out);
}

template <class T>
Entry *Step<T>::room_for(Tile &tile, int count) {
    size_t size = tile.entries.size();
    tile.entries.resize(size + count);
    return tile.entries.data() + size;
}

template <class T>
void Step<T>::fill(Tile &tile, Entry *end) { tile.entries.resize(end - tile.entries.data()); }

// What latents compete by: pre, times the norms of free atoms, its size alone where codes are signed.
template <class T>
const float *Step<T>::scores(const Member &m, const float *pre, Scratch &s) const {
    if (!p.norms && !p.is_signed) return pre;
    const float *norms = p.norms ? p.norms + m.index * p.d_sae : nullptr;
    for (int64_t i = 0; i < p.d_sae; i++) {
        float score = norms ? pre[i] * norms[i] : pre[i];
        s.score[i] = p.is_signed ? std::fabs(score) : score;
    }
    return s.score.data();
}

template <class T>
void Step<T>::select_dead(const Member &m, const float *pre, Tile &tile, Scratch &s) {
    int n = int(m.dead.size()), k = int(std::min<int64_t>(p.k_aux, n));
    const float *norms = p.norms ? p.norms + m.index * p.d_sae : nullptr;
    s.atoms.resize(n);
    for (int i = 0; i < n; i++) {
        float score = norms ? pre[m.dead[i]] * norms[m.dead[i]] : pre[m.dead[i]];
        s.atoms[i] = p.is_signed ? std::fabs(score) : score;
    }
    int count = largest(s.atoms.data(), n, k, s.room.data(), s.places.data());
    Entry *out = room_for(tile, count);
    for (int i = 0; i < count; i++) {
        int32_t at = m.dead[s.places[i]];
        *out = {at, 0, pre[at], 0, 0, 0};
        out += p.is_signed ? pre[at] != 0 : !(pre[at] <= 0);
    }
    fill(tile, out);
}

// BatchTopK: the smallest score kept in the batch, from all that are above the floor.
template <class T>
void Step<T>::settle(Member &m) {
    std::vector<float> all;
    int64_t count = p.k[m.index];
    for (auto &tile : m.tiles)
        for (size_t r = 0; r + 1 < tile.starts.size(); r++)
            for (int32_t i = tile.starts[r]; i < tile.aux_starts[r]; i++)
                if (tile.entries[i].inside == tile.entries[i].inside) all.push_back(tile.entries[i].inside);
    if (int64_t(all.size()) < count && m.floor > 0) dense[m.index].store(true);  // the sample misled
    if (int64_t(all.size()) > count) {
        std::vector<float> keys(all);
        keys.resize(all.size() + LANES);
        m.last = kth_of(keys.data(), int64_t(all.size()), count);
    }
    float smallest = INFINITY;
    for (float score : all)
        if (score >= m.last && score < smallest) smallest = score;
    p.smallest[m.index] = smallest;
}
