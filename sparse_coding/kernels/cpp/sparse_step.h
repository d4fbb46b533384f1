// The step as a class: what its phases share, and their order. Each phase has a file of its own.
#pragma once

#include <time.h>

#include <memory>
#include <mutex>

#include "rows.h"
#include "select.h"
#include "sparse_problem.h"
#include "team.h"

struct Entry {
    int32_t latent, source;  // which row of the errors its atom learns from
    float f, slope;          // its code, and d loss / d pre
    float inside;            // d loss / d f, where `counted`; before that, what BatchTopK compares
    int32_t counted;         // whether it counts for the threshold's gradient
};

struct Placed {  // an entry in the list of its latent
    int32_t row, source;
    float f, slope, inside;
    int32_t counted;
};

struct Tile {
    std::vector<Entry> entries;
    std::vector<int32_t> starts, aux_starts;  // of each row; its AuxK entries come last
    std::vector<double> sums;                 // errors of each prefix, then squared error, AuxK, L1
    std::vector<float> d_b_dec;
};

template <class T> class Step {
  public:
    explicit Step(const Problem &p) : p(p), team(p.threads) {
        depth = (p.d_in + 15) / 16 * 16;
        blocks = (p.d_sae + WIDTH - 1) / WIDTH;
        columns = blocks * WIDTH;
        // as large as lets every thread have two, so that the panels are read seldom
        tile_rows = std::clamp<int64_t>((p.rows / (2 * p.threads) + ROWS) / ROWS * ROWS, 2 * ROWS, 16 * ROWS);
        n_tiles = (p.rows + tile_rows - 1) / tile_rows;
        slots = p.n_ends + (p.dead ? 1 : 0);
        // Of many members each thread takes whole ones and waits for nobody; of few, all threads share as many at once
        // as give everybody enough pieces. Either way every sum has the same order.
        whole = p.members >= 4 * p.threads;
        group = std::min<int64_t>(p.members, std::max<int64_t>(1, (8 * p.threads + n_tiles - 1) / n_tiles));
        members.resize(whole ? p.threads : group);
        dense.reset(new std::atomic<bool>[p.members]);
        for (int64_t i = 0; i < p.members; i++) dense[i] = p.left[i];
        for (auto &m : members) {
            m.panels.reset(new Element[size_t(blocks) * depth * WIDTH]);
            m.inputs.reset(new T[size_t(p.rows) * depth]);
            m.errors.reset(new T[size_t(slots) * p.rows * p.d_out]);
            m.bias.resize(columns);
            m.starts.resize(p.d_sae + 1);
            m.tiles.resize(n_tiles);
            m.d_b_dec.resize(size_t(blocks) * p.d_in);
        }
    }

    void run() {
        team.run([this](int thread) { work(thread); });
        for (int64_t i = 0; i < p.members; i++) p.left[i] = dense[i].load();
    }

  private:
    using Element = typename Panel<T>::Element;
    static constexpr double MARGIN = 2, SLACK = 1.25;

    struct Member {
        std::unique_ptr<Element[]> panels;
        std::unique_ptr<T[]> inputs, errors;
        std::vector<float> bias, d_b_dec;
        std::vector<int32_t> starts, dead;
        std::vector<Tile> tiles;
        std::vector<Placed> placed;
        float floor, last;  // BatchTopK: a score that those kept are above, and the smallest of them
        int64_t index;      // in the stack
    };

    struct Scratch {
        std::vector<float> pre, score, room, error, suffix, encoder, atoms, fits;
        std::vector<int32_t> places, ends;
        double spent[PHASES] = {}, since = 0;
    };

    const Problem &p;
    Team team;
    int64_t depth, blocks, columns, tile_rows, n_tiles, slots, group;
    std::vector<Member> members;
    bool whole;
    std::unique_ptr<std::atomic<bool>[]> dense;  // of each member
    std::mutex lock;

    void work(int thread) {
        Scratch s;
        run_phases(s, thread);
        std::lock_guard<std::mutex> held(lock);
        for (int i = 0; p.seconds && i < PHASES; i++) p.seconds[i] += s.spent[i];
    }

    void run_phases(Scratch &s, int thread) {
        s.pre.resize(tile_rows * columns);
        s.score.resize(columns);
        s.room.resize((p.rule == BATCH ? tile_rows : 2) * columns + 16);
        s.places.resize(tile_rows * columns + 16);
        s.ends.resize(p.n_ends);
        s.error.resize(p.d_out);
        s.suffix.resize((p.n_ends + 1) * p.d_out);
        s.encoder.resize(size_t(WIDTH) * p.d_in);
        s.fits.resize(p.d_out);
        if (p.seconds) s.since = processor_seconds();
        if (whole) {
            Member &m = members[thread];
            for (int i; (i = team.next(int(p.members))) >= 0;) {
                begin(m, i);
                phases(s, [&](Phase phase, int64_t pieces, auto f) {
                    for (int64_t piece = 0; piece < pieces && !dense[i].load(); piece++) f(m, piece);
                    spent(s, phase);
                });
            }
            return;
        }
        for (int64_t first = 0; first < p.members; first += group) {
            int64_t count = std::min(group, p.members - first);
            team.meet([&] {
                for (int64_t i = 0; i < count; i++) begin(members[i], first + i);
            });
            // every piece of every member once, by whoever comes first; then all wait for all
            phases(s, [&](Phase phase, int64_t pieces, auto f) {
                if (p.seconds) s.since = processor_seconds();
                for (int i; (i = team.next(int(count * pieces))) >= 0;) {
                    if (!dense[first + i / pieces].load()) f(members[i / pieces], i % pieces);
                    spent(s, phase);
                }
                team.meet();
            });
        }
    }

    template <class F> void phases(Scratch &s, F share) {
        share(PACK, depth / 16, [&](Member &m, int64_t i) { pack_(m, i); });
        if (p.rule == BATCH) share(CHOOSE, 1, [&](Member &m, int64_t) { guess(m, s); });
        if (p.rule == ABOVE) share(CHOOSE, 1, [&](Member &m, int64_t) { probe(m, s); });
        share(CHOOSE, n_tiles, [&](Member &m, int64_t t) { encode(m, t, s); });
        if (p.rule == BATCH) share(CHOOSE, 1, [&](Member &m, int64_t) { settle(m); });
        share(RECONSTRUCT, n_tiles, [&](Member &m, int64_t t) { reconstruct(m, t, s); });
        share(INDEX, 1, [&](Member &m, int64_t) { index(m); });
        share(WEIGHTS, blocks, [&](Member &m, int64_t b) { weights(m, b, s); });
        share(WEIGHTS, 1, [&](Member &m, int64_t) { finish(m); });
    }

    void spent(Scratch &s, Phase phase) const {
        if (!p.seconds) return;
        double now = processor_seconds();
        s.spent[phase] += now - s.since;
        s.since = now;
    }

    static double processor_seconds() {
        timespec now = {};
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
        return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
    }

    const float *W_enc(const Member &m) const { return p.W_enc + m.index * p.d_in * p.d_sae; }
    const float *W_dec(const Member &m) const { return p.W_dec + m.index * p.d_sae * p.d_out; }
    const float *b_dec(const Member &m) const { return p.b_dec ? p.b_dec + m.index * p.d_out : nullptr; }

    void begin(Member &m, int64_t index) {
        m.index = index;
        m.floor = m.last = 0;
        std::copy(p.b_enc + index * p.d_sae, p.b_enc + (index + 1) * p.d_sae, m.bias.begin());
        std::fill(m.bias.begin() + p.d_sae, m.bias.end(), -INFINITY);
        m.dead.clear();
        for (int64_t i = 0; p.dead && i < p.d_sae; i++)
            if (p.dead[index * p.d_sae + i]) m.dead.push_back(int32_t(i));
    }

    void pack_(Member &m, int64_t i) {
        bool tied = !p.W_enc;
        pack<T>(tied ? W_dec(m) : W_enc(m), tied, int(p.d_in), int(p.d_sae), int(depth), int(16 * i), int(16 * i + 16),
                m.panels.get());
    }

    // sparse_encode.h
    void centre(const Member &m, int64_t b, T *out) const;
    void pre_activations(const Member &m, const T *inputs, int64_t rows, Scratch &s) const;
    void guess(Member &m, Scratch &s);
    void probe(Member &m, Scratch &s);
    void sample(const Member &m, int64_t rows, Scratch &s) const;
    void encode(Member &m, int64_t t, Scratch &s);
    void select(const Member &m, const float *pre, Tile &tile, Scratch &s);
    static Entry *room_for(Tile &tile, int count);
    static void fill(Tile &tile, Entry *end);
    const float *scores(const Member &m, const float *pre, Scratch &s) const;
    void select_dead(const Member &m, const float *pre, Tile &tile, Scratch &s);
    void settle(Member &m);

    // sparse_reconstruct.h
    void reconstruct(Member &m, int64_t t, Scratch &s);
    void row(Member &m, int64_t b, Entry *e, int count, Tile &tile, Scratch &s);
    void revive(Member &m, int64_t b, Entry *e, int count, Tile &tile, Scratch &s);
    void slopes(const float *error, const float *W, Entry *e, int count, float penalty) const;

    // sparse_weights.h
    void index(Member &m);
    void weights(Member &m, int64_t block, Scratch &s);
    void through_encoder(Member &m, int64_t block, const float *slope);
    void finish(Member &m);
};
