// One training step of a stack of dense dictionaries: see dense.py, which calls it and says what it computes.
//
//   pack       weights into panels, rounded to the precision of the products
//   rows       a tile of rows at a time: codes, x_hat, its error
//   latents    a panel of latents at a time: gradients of codes, encoder columns and atoms
// A thread takes whole members, whose codes then stay in its cache; the members that are left over when the number of
// threads does not divide them are shared, phase by phase. Either way every sum has the same order.

#include <unistd.h>

#include <algorithm>
#include <memory>

#include "dense_problem.h"
#include "dense_tile.h"
#include "team.h"

static int64_t cache_bytes() {
    long found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? found : 512 * 1024;
}

template <class T> using Room = std::unique_ptr<T[]>;

template <class T> static Room<T> room(size_t count) { return Room<T>(new T[count]); }

// GATES: two kinds of codes, the magnitudes f and the open gates, each with an x_hat of its own.
template <class T, bool GATES> class DenseStep {
  public:
    explicit DenseStep(const DenseProblem &p) : p(p), team(int(p.threads)) {
        d = padded(p.d_in, WIDTH), o = padded(p.d_out, WIDTH), n = padded(p.d_sae, WIDTH);
        panels = n / WIDTH;
        n_tiles = (p.rows + LARGEST - 1) / LARGEST;
        tile = (p.rows + n_tiles - 1) / n_tiles;
        while (tile % 2 || (tile % ROWS && tile % ROWS != 4)) tile++;  // what the product takes without single rows
        rows = n_tiles * tile;
        // Sizes that only cut a sum into pieces, which changes no bit of it, are fitted to the cache: encoder and decoder
        // of a block of latents fill half of it; the codes, slopes and errors of a chunk of rows a third.
        int64_t cache = cache_bytes();
        block = std::clamp<int64_t>(cache / 2 / ((d + o) * int64_t(sizeof(T))) / WIDTH, 1, std::min<int64_t>(8, panels)) * WIDTH;
        chunk = std::clamp<int64_t>(cache / 3 / ((KINDS * 2 + 1) * WIDTH * int64_t(sizeof(T))) / tile, 1, n_tiles) * tile;
        whole = p.members / p.threads * p.threads;
        int64_t buffers = whole ? p.threads : 1;
        for (int64_t i = 0; i < buffers; i++) members.emplace_back(*this);
        for (int64_t i = 0; i < p.threads; i++) scratches.emplace_back(*this);
    }

    void run() {
        team.run([this](int thread) { work(thread); });
    }

  private:
    static constexpr int S = STEP<T>, KINDS = GATES ? 2 : 1;
    static constexpr int64_t LARGEST = 96;

    struct Member {
        explicit Member(const DenseStep &s)
            : decoder(room<T>(s.n * s.o)), transposed(room<T>(s.n * s.o)), inputs(room<T>(s.rows * s.d)),
              partial(room<float>((KINDS * s.n_tiles + s.panels) * s.o)), sums(room<double>(2 * s.n_tiles)) {
            if (s.p.W_enc) encoder = room<T>(s.n * s.d);
            for (int k = 0; k < KINDS; k++) {
                codes[k] = room<T>(s.rows * s.n);
                errors[k] = room<T>(s.rows * s.o);
                paired_errors[k] = room<T>(s.rows * s.o);
            }
        }
        Room<T> encoder, decoder, transposed;         // panels of W_enc, W_dec, W_dec^T
        Room<T> inputs, codes[KINDS];                 // paired along rows
        Room<T> errors[KINDS], paired_errors[KINDS];  // d loss / d x_hat: rows, and paired along them
        Room<float> partial;                          // of d_b_dec, by tile and by panel
        Room<double> sums;
    };

    struct Scratch {
        explicit Scratch(const DenseStep &s)
            : x(room<float>(s.tile * s.d)), pre(room<float>(s.tile * WIDTH)), inputs(room<T>(s.tile * s.d)),
              packing(room<T>(WIDTH * s.o)), slopes(room<T>(s.chunk * WIDTH)), d_encoder(room<float>(s.d * WIDTH)),
              d_decoder(room<float>(WIDTH * s.o)) {
            for (int k = 0; k < KINDS; k++) {
                codes[k] = room<T>(s.tile * s.block);
                error[k] = room<float>(s.tile * s.o);
                d_code[k] = room<float>(s.tile * WIDTH);
            }
        }
        Room<float> x, pre;
        Room<T> inputs, codes[KINDS], packing, slopes;
        Room<float> error[KINDS], d_code[KINDS], d_encoder, d_decoder;
    };

    const DenseProblem &p;
    Team team;
    int64_t d, o, n, n_tiles, tile, rows, panels, block, chunk, whole;  // widths padded to panels, rows to tiles
    std::vector<Member> members;
    std::vector<Scratch> scratches;

    void work(int thread) {
        Scratch &s = scratches[thread];
        for (int64_t i; (i = team.next(int(whole))) >= 0;) {
            Member &m = members[thread];
            for (int64_t j = 0; j < panels; j++) pack(m, i, j, s);
            for (int64_t t = 0; t < n_tiles; t++) reconstruct(m, i, t, s);
            for (int64_t j = 0; j < panels; j++) latents(m, i, j, s);
            finish(m, i);
        }
        for (int64_t i = whole; i < p.members; i++) {
            Member &m = members[0];
            share(panels, [&](int64_t j) { pack(m, i, j, s); });
            share(n_tiles, [&](int64_t t) { reconstruct(m, i, t, s); });
            share(panels, [&](int64_t j) { latents(m, i, j, s); });
            team.meet([&] { finish(m, i); });
        }
    }

    template <class F> void share(int64_t pieces, F f) {
        team.meet();
        for (int64_t i; (i = team.next(int(pieces))) >= 0;) f(i);
        team.meet();
    }

    // ---- weights

    void pack(Member &m, int64_t i, int64_t j, Scratch &s) {
        const float *W_dec = p.W_dec + i * p.d_sae * p.d_out;
        pair_panel_transposed(W_dec, p.d_sae, p.d_out, j * WIDTH, o, s.packing.get(), &m.transposed[j * o * WIDTH]);
        if (p.W_enc) pair_panel(p.W_enc + i * p.d_in * p.d_sae, p.d_in, p.d_sae, j * WIDTH, d, &m.encoder[j * d * WIDTH]);
        // the latents of this panel in all panels of W_dec
        const float *own = W_dec + j * WIDTH * p.d_out;
        int64_t count = std::min<int64_t>(WIDTH, p.d_sae - j * WIDTH);
        for (int64_t c = 0; c < o; c += WIDTH) pair_panel(own, count, p.d_out, c, WIDTH, &m.decoder[c * n + j * WIDTH * WIDTH]);
    }

    const T *encoder(const Member &m) const { return p.W_enc ? m.encoder.get() : m.transposed.get(); }

    // ---- rows

    void reconstruct(Member &m, int64_t i, int64_t t, Scratch &s) {
        int64_t first = t * tile, real = std::min(tile, p.rows - first);
        const float *b_dec = p.b_dec ? p.b_dec + i * p.d_out : nullptr;
        centre(p.x + first * p.d_in, p.d_in, real, p.subtracts ? b_dec : nullptr, 1, s.x.get(), tile, d);
        for (int64_t k = 0; k < tile * d; k += LANES) store_rounded(&s.inputs[k], load(&s.x[k]));
        pair_tile(s.x.get(), tile, d, m.inputs.get(), rows, first);
        for (int k = 0; k < KINDS; k++) centre(p.target + first * p.d_out, p.d_out, real, b_dec, -1, s.error[k].get(), tile, o);
        for (int64_t start = 0; start < n; start += block) {
            int64_t width = std::min(block, n - start);
            for (int64_t c = 0; c < width; c += WIDTH) encode(m, i, t, real, start + c, c, s);
            for (int k = 0; k < KINDS; k++)
                for (int64_t c = 0; c < o; c += WIDTH)
                    add_product(s.codes[k].get(), block, S, tile, &m.decoder[c * n + start * WIDTH], int(width / S),
                                &s.error[k][c], o);
        }
        for (int k = 0; k < KINDS; k++) settle(m, t, real, k, s);
    }

    // Codes of the latents from `latent` on, a panel of them; column `at` of the block that is decoded next.
    void encode(Member &m, int64_t i, int64_t t, int64_t real, int64_t latent, int64_t at, Scratch &s) {
        float bias[WIDTH], scale[WIDTH], shift[WIDTH];
        for (int c = 0; c < WIDTH; c++) {
            int64_t own = i * p.d_sae + latent + c;
            bool there = latent + c < p.d_sae;
            bias[c] = there ? p.b_enc[own] : 0;
            if (GATES) scale[c] = there ? std::exp(p.r_mag[own]) : 0, shift[c] = there ? p.b_mag[own] : 0;
        }
        float none[WIDTH] = {};
        add_product(s.inputs.get(), d, S, tile, encoder(m) + latent * d, int(d / S), s.pre.get(), WIDTH, GATES ? none : bias);
        const Vector zero = {};
        for (int64_t r = 0; r < tile; r += S)
            for (int v = 0; v < WIDTH; v += LANES) {
                Vector f[KINDS][S];
                for (int k = 0; k < S; k++) {
                    Vector pre = load(&s.pre[(r + k) * WIDTH + v]);
                    for (int kind = 0; kind < KINDS; kind++) f[kind][k] = zero;
                    if (r + k >= real) continue;
                    if (!GATES) f[0][k] = pre <= zero ? zero : pre;  // NaN stays NaN
                    else {
                        Vector gate = pre + load(bias + v), size = load(scale + v) * pre + load(shift + v);
                        f[KINDS - 1][k] = gate <= zero ? zero : gate;
                        f[0][k] = (gate <= zero) | (size <= zero) ? zero : size;
                    }
                }
                for (int kind = 0; kind < KINDS; kind++) {
                    pair(f[kind], &m.codes[kind][latent * rows + (t * tile + r) * WIDTH + v * S]);
                    for (int k = 0; k < S; k++) store_rounded(&s.codes[kind][(r + k) * block + at + v], f[kind][k]);
                }
            }
    }

    // From x_hat - target to d loss / d x_hat.
    void settle(Member &m, int64_t t, int64_t real, int kind, Scratch &s) {
        float *error = s.error[kind].get(), *sum = &m.partial[(kind * n_tiles + t) * o];
        double squared = 0;
        for (int64_t r = 0; r < real; r++) {
            float own = 0;
            for (int64_t c = 0; c < p.d_out; c++) own += error[r * o + c] * error[r * o + c];
            squared += own;
        }
        m.sums[kind * n_tiles + t] = squared;
        float scale = float(2 * (kind ? 1.0 / p.rows : p.error_weight));
        std::fill(sum, sum + o, 0.f);
        for (int64_t r = 0; r < tile; r++)
            for (int64_t c = 0; c < o; c++) {
                error[r * o + c] *= scale;
                sum[c] += error[r * o + c];
            }
        for (int64_t k = 0; k < tile * o; k += LANES) store_rounded(&m.errors[kind][t * tile * o + k], load(error + k));
        pair_tile(error, tile, o, m.paired_errors[kind].get(), rows, t * tile);
    }

    // ---- latents

    void latents(Member &m, int64_t i, int64_t j, Scratch &s) {
        std::fill(&s.d_encoder[0], &s.d_encoder[d * WIDTH], 0.f);
        std::fill(&s.d_decoder[0], &s.d_decoder[WIDTH * o], 0.f);
        int64_t latent = j * WIDTH;
        Sums sums;
        for (int64_t first = 0; first < rows; first += chunk) {
            int64_t count = std::min(chunk, rows - first);
            for (int64_t r = 0; r < count; r += tile) slopes(m, i, latent, first + r, &s.slopes[r * WIDTH], sums, s);
            int steps = int(count / S);
            for (int64_t c = 0; c < o; c += WIDTH) {
                for (int k = 0; k < (p.frozen ? 1 : KINDS); k++)
                    add_product(&m.codes[k][latent * rows + first * WIDTH], S, S * WIDTH, WIDTH,
                                &m.paired_errors[k][c * rows + first * WIDTH], steps, &s.d_decoder[c], o);
                if (!p.W_enc)  // tied: the encoder's gradient is the atom's
                    add_product(&s.slopes[0], S, S * WIDTH, WIDTH, &m.inputs[c * rows + first * WIDTH], steps,
                                &s.d_decoder[c], o);
            }
            for (int64_t c = 0; p.W_enc && c < d; c += WIDTH)
                add_product(&m.inputs[c * rows + first * WIDTH], S, S * WIDTH, WIDTH, &s.slopes[0], steps,
                            &s.d_encoder[c * WIDTH], WIDTH);
        }
        write(m, i, j, sums, s);
    }

    struct Sums {  // over rows, of a panel of latents
        float active[WIDTH] = {}, total[WIDTH] = {}, gates[WIDTH] = {}, slope[WIDTH] = {}, size[WIDTH] = {}, log[WIDTH] = {};
        void add(float *sum, int v, Vector value) { store(sum + v, load(sum + v) + value); }
    };

    // d loss / d pre of a tile of rows, paired.
    void slopes(Member &m, int64_t i, int64_t latent, int64_t first, T *out, Sums &sums, Scratch &s) {
        float penalty[WIDTH], scale[WIDTH] = {}, shift[WIDTH] = {}, none[WIDTH] = {};
        for (int c = 0; c < WIDTH; c++) {
            int64_t own = i * p.d_sae + latent + c;
            bool there = latent + c < p.d_sae;
            penalty[c] = there ? p.penalty[own] : 0;
            if (GATES && there) scale[c] = std::exp(p.r_mag[own]), shift[c] = p.b_mag[own];
        }
        for (int k = 0; k < KINDS; k++)
            add_product(&m.errors[k][first * o], o, S, tile, &m.transposed[latent * o], int(o / S), s.d_code[k].get(), WIDTH,
                        k == KINDS - 1 ? penalty : none);
        const Vector zero = {}, one = zero + 1;
        for (int v = 0; v < WIDTH; v += LANES) {
            Vector active = zero, total = zero, gates = zero, slope = zero, size = zero, log = zero;
            for (int64_t r = 0; r < tile; r += S) {
                Vector f[S], open[S], result[S];
                int64_t at = latent * rows + (first + r) * WIDTH + v * S;
                unpair(&m.codes[0][at], f);
                if (GATES) unpair(&m.codes[KINDS - 1][at], open);
                for (int k = 0; k < S; k++) {
                    Vector d_f = f[k] <= zero ? zero : load(&s.d_code[0][(r + k) * WIDTH + v]);
                    active += f[k] <= zero ? zero : one;
                    total += f[k];
                    if (!GATES) result[k] = d_f;
                    else {
                        Vector d_gate = open[k] <= zero ? zero : load(&s.d_code[KINDS - 1][(r + k) * WIDTH + v]);
                        gates += open[k];
                        size += d_f;
                        log += d_f * (f[k] - load(shift + v));
                        slope += d_gate;
                        result[k] = d_gate + load(scale + v) * d_f;
                    }
                    if (!GATES) slope += d_f;
                }
                pair(result, out + r * WIDTH + v * S);
            }
            sums.add(sums.active, v, active), sums.add(sums.total, v, total), sums.add(sums.slope, v, slope);
            if (GATES) sums.add(sums.gates, v, gates), sums.add(sums.size, v, size), sums.add(sums.log, v, log);
        }
    }

    void write(Member &m, int64_t i, int64_t j, Sums &sums, Scratch &s) {
        int64_t latent = j * WIDTH, count = std::min<int64_t>(WIDTH, p.d_sae - latent), own = i * p.d_sae + latent;
        for (int64_t c = 0; c < count; c++) {
            p.active[own + c] = sums.active[c], p.codes[own + c] = sums.total[c], p.d_b_enc[own + c] = sums.slope[c];
            if (GATES) {
                float scale = std::exp(p.r_mag[own + c]);
                p.gates[own + c] = sums.gates[c], p.d_b_mag[own + c] = sums.size[c], p.d_r_mag[own + c] = sums.log[c];
                sums.slope[c] += scale * sums.size[c];  // of x W_enc
            }
            std::copy_n(&s.d_decoder[c * o], p.d_out, p.d_W_dec + (own + c) * p.d_out);
        }
        for (int64_t r = 0; p.W_enc && r < p.d_in; r++)
            std::copy_n(&s.d_encoder[r * WIDTH], count, p.d_W_enc + (i * p.d_in + r) * p.d_sae + latent);
        if (!p.subtracts) return;
        // what the panel sends back to b_dec through the encoder: - W_enc slope
        const T *panel = encoder(m) + latent * d;
        float *back = &m.partial[(KINDS * n_tiles + j) * o];
        for (int64_t r = 0; r < d; r += S) {
            Vector sum[S] = {};
            for (int v = 0; v < WIDTH; v += LANES) {
                Vector weights[S];
                unpair(panel + r * WIDTH + v * S, weights);
                for (int k = 0; k < S; k++) sum[k] += weights[k] * load(sums.slope + v);
            }
            for (int k = 0; k < S; k++) {
                float all = 0;
                for (int l = 0; l < LANES; l++) all += sum[k][l];
                back[r + k] = -all;
            }
        }
    }

    void finish(Member &m, int64_t i) {
        for (int k = 0; k < 2; k++) {
            double sum = 0;
            for (int64_t t = 0; k < KINDS && t < n_tiles; t++) sum += m.sums[k * n_tiles + t];
            p.sums[2 * i + k] = sum;
        }
        if (!p.b_dec) return;
        float *out = p.d_b_dec + i * p.d_out;
        std::fill(out, out + p.d_out, 0.f);
        for (int64_t t = 0; t < (p.frozen ? 1 : KINDS) * n_tiles; t++)
            for (int64_t c = 0; c < p.d_out; c++) out[c] += m.partial[t * o + c];
        for (int64_t j = 0; p.subtracts && j < panels; j++)
            for (int64_t c = 0; c < p.d_out; c++) out[c] += m.partial[(KINDS * n_tiles + j) * o + c];
    }
};

template <class T> static void dense(const DenseProblem &p) {
    if (p.r_mag) DenseStep<T, true>(p).run();
    else DenseStep<T, false>(p).run();
}

// 0: done. 1: this CPU does not multiply bf16, nothing was computed.
extern "C" int dense_step(const DenseProblem *p) {
    if (!p->half) dense<float>(*p);
#if defined(__AVX512BF16__)
    else dense<bf16>(*p);
#else
    else return 1;
#endif
    return 0;
}
