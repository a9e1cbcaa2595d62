// A random choice in proportion to weights, as a race: entrant n comes in at E(n) / weight, where E(n) is an exponential random number of
// its own, and the first one is chosen. Weights that differ little choose the same entrant nearly always; see execution/sampling/draw.py.

// Numbers of a row's entrants: blocks from 0 on, tokens from FIRST_TOKEN on.
constexpr uint64_t FIRST_TOKEN = uint64_t{1} << 32;
// Numbers of the generator are apart by it; see execution/sampling/random.py.
constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;
// Entrants that run together.
constexpr int64_t FIELD = 128;

// SplitMix64's mixing function, of one number or a vector of them.
template <class Bits> inline void mix_bits(Bits& bits) {
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
    bits = bits ^ bits >> 31;
}

inline uint64_t random_bits(uint64_t start, uint64_t number) {
    uint64_t bits = start + (number + 1) * GAMMA;
    mix_bits(bits);
    return bits;
}

// Where the random numbers of a position start: number `position * 4` (four streams, of which this is the first) of the generator `key`.
inline uint64_t position_start(int64_t key, int64_t position) {
    return random_bits(static_cast<uint64_t>(key), static_cast<uint64_t>(position) * 4);
}

// 1 - u, to a float's precision, of `count` uniform random numbers u from `first` on, and of as many more as make whole sixteens.
inline void fill_distances(uint64_t start, uint64_t first, int64_t count, float* distances) {
#if defined(__AVX512DQ__)
    constexpr int LANES = 8;
#else
    constexpr int LANES = 4;
#endif
    typedef uint64_t Bits __attribute__((vector_size(LANES * 8)));
    typedef double Doubles __attribute__((vector_size(LANES * 8)));
    typedef float Floats __attribute__((vector_size(LANES * 4)));
    uint64_t states[LANES];
    for (int lane = 0; lane < LANES; ++lane) states[lane] = start + (first + static_cast<uint64_t>(lane) + 1) * GAMMA;
    Bits state;
    std::memcpy(&state, states, sizeof state);
    const int64_t end = (count + 15) / 16 * 16;
    for (int64_t i = 0; i < end; i += LANES, state += LANES * GAMMA) {
        Bits bits = state;
        mix_bits(bits);
        bits = bits >> 12 | 0x3FF0000000000000u;  // 52 bits behind the point of 1
        Doubles numbers;
        std::memcpy(&numbers, &bits, sizeof numbers);
        const Floats rounded = __builtin_convertvector(2.0 - numbers - 0x1p-53, Floats);
        std::memcpy(distances + i, &rounded, sizeof rounded);
    }
}

struct Race {
    uint64_t start;
    double best = __builtin_inf();
    int64_t winner = 0;

    double time_of(uint64_t number, float weight) const {
        const double uniform = (static_cast<double>(random_bits(start, number) >> 12) + 0.5) * 0x1p-52;
        return -__builtin_log(uniform) / static_cast<double>(weight);
    }

    // Let up to FIELD entrants run, first, first + 1, ..., as far as their weights are above 0 and at least `bound`; the random number of
    // each is `numbers` + entrant. The first of equals wins. Since -log(u) is not below 1 - u, nobody comes in before (1 - u) / weight,
    // and few logarithms have to be taken.
    void run(uint64_t numbers, int64_t first, const float* weights, int64_t count, float bound) {
        constexpr double ROUNDING = 1.0 - 1e-6;
        float distances[FIELD], speeds[FIELD];
        fill_distances(start, numbers + static_cast<uint64_t>(first), count, distances);
        const f32x16 bounds = f32x16::set(bound);
        f32x16 largest = f32x16::zero();
        for (int64_t i = 0; i < count; i += 16) {
            const f32x16 weight = load_some(weights + i, count - i);
            const f32x16 speed = where_at_least(weight, bounds, weight) / f32x16::load(distances + i);
            speed.store(speeds + i);
            largest = max(speed, largest);
        }
        const float fastest = reduce_max(largest);
        if (!(fastest > 0.0f) || static_cast<double>(fastest) * best < ROUNDING) return;
        int64_t likely = 0;
        while (speeds[likely] < fastest) ++likely;
        const double time = time_of(numbers + static_cast<uint64_t>(first + likely), weights[likely]);
        const f32x16 slowest = f32x16::set(static_cast<float>(ROUNDING / (time < best ? time : best)));
        for (int64_t i = 0; i < count; i += 16) {
            for (uint32_t lanes = at_least(f32x16::load(speeds + i), slowest); lanes; lanes &= lanes - 1) {
                const int64_t place = i + __builtin_ctz(lanes);
                const double own = place == likely ? time : time_of(numbers + static_cast<uint64_t>(first + place), weights[place]);
                if (!(own < best)) continue;
                best = own;
                winner = first + place;
            }
        }
    }
};
