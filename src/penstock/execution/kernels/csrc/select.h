// The value at which the largest numbers of an array, taken in descending order, add up to a goal: without sorting the array.
//
// A small sample says where that value must be about, one pass counts what lies above that range and collects what lies inside, and the
// rest is decided there in the same way. The result is exact whatever the sample was; it decides only how many passes are made.
// Nothing of the standard library's templates is used: the linker would share their code between instruction sets.

constexpr int64_t SORTED_AT_ONCE = 256;

// Sixteen values, or as many as there are; the other lanes are not a number and so compare false with everything.
inline f32x16 load_some(const float* values, int64_t available) {
    if (available >= 16) return f32x16::load(values);
    float padded[16];
    for (int64_t i = 0; i < 16; ++i) padded[i] = i < available ? values[i] : __builtin_nanf("");
    return f32x16::load(padded);
}

// Up to SORTED_AT_ONCE values in descending order: each one's place is the number of values before it.
inline void sort_descending(const float* values, int64_t count, float* sorted) {
    const int64_t vectors = (count + 15) / 16;
    f32x16 all[SORTED_AT_ONCE / 16];
    for (int64_t j = 0; j < vectors; ++j) all[j] = load_some(values + 16 * j, count - 16 * j);
    for (int64_t i = 0; i < count; ++i) {
        const f32x16 value = f32x16::set(values[i]);
        const int64_t own = i / 16;
        int place = 0;
        for (int64_t j = 0; j < own; ++j) place += __builtin_popcount(at_least(all[j], value));
        const uint32_t before = (1u << (i % 16)) - 1;
        place += __builtin_popcount(greater(all[own], value) | (at_least(all[own], value) & before));
        for (int64_t j = own + 1; j < vectors; ++j) place += __builtin_popcount(greater(all[j], value));
        sorted[place] = values[i];
    }
}

// Float sums of 512 values each, added up in double precision.
inline double sum_of(const float* values, int64_t count) {
    double total = 0.0;
    for (int64_t start = 0; start < count; start += 512) {
        f32x16 sum = f32x16::zero();
        const int64_t end = start + 512 < count ? start + 512 : count;
        for (int64_t i = start; i < end; i += 16) {
            const f32x16 value = load_some(values + i, end - i);
            sum = sum + where_greater(value, f32x16::zero(), value);
        }
        total += static_cast<double>(reduce_add(sum));
    }
    return total;
}

// The values within [low, high], in their order; `over`: the number (or, BY_MASS, the sum) of those above high.
template <bool BY_MASS>
inline int64_t take_between(const float* values, int64_t count, float low, float high, float* taken, double* over) {
    const f32x16 lowest = f32x16::set(low), highest = f32x16::set(high);
    int64_t inside = 0;
    double total = 0.0;
    for (int64_t start = 0; start < count; start += 512) {
        f32x16 sum = f32x16::zero();
        int64_t number = 0;
        const int64_t end = start + 512 < count ? start + 512 : count;
        for (int64_t i = start; i < end; i += 16) {
            const f32x16 value = load_some(values + i, end - i);
            const uint32_t above = greater(value, highest), lanes = at_least(value, lowest) & ~above;
            if (BY_MASS) sum = sum + where_greater(value, highest, value);
            else number += __builtin_popcount(above);
            if (lanes) inside += store_selected(value, lanes, taken + inside);
        }
        total += BY_MASS ? static_cast<double>(reduce_add(sum)) : static_cast<double>(number);
    }
    *over = total;
    return inside;
}

// The values above `bound` (or, BELOW, below it), in their order.
template <bool BELOW> inline int64_t take_beyond(const float* values, int64_t count, float bound, float* taken) {
    const f32x16 bounds = f32x16::set(bound);
    int64_t beyond = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const f32x16 value = load_some(values + i, count - i);
        const uint32_t lanes = BELOW ? greater(bounds, value) : greater(value, bounds);
        if (lanes) beyond += store_selected(value, lanes, taken + beyond);
    }
    return beyond;
}

// Floats of memory that threshold_of wants for `count` values.
inline int64_t threshold_floats(int64_t count) { return 2 * (count + 16); }

// The largest t for which the values of at least t are `goal` many (or, BY_MASS, sum up to `goal`; then none is negative); the smallest value
// when all of them are too few. None of the values is NaN, and there is at least one.
template <bool BY_MASS> inline float threshold_of(const float* values, int64_t count, double goal, float* memory) {
    float sample[SORTED_AT_ONCE], sorted[SORTED_AT_ONCE];
    float *next = memory, *other = memory + count + 16;
    double above = 0.0;   // of the values that are larger than all of `values`
    int64_t spread = 20;  // two and a half standard deviations of a sample's median's place
    bool misled = false;  // few large values among many small ones: a sample knows nothing of their sum
    while (true) {
        const int64_t size = count < SORTED_AT_ONCE ? count : SORTED_AT_ONCE;
        for (int64_t i = 0; i < size; ++i) sample[i] = values[i * count / size];
        sort_descending(sample, size, sorted);
        const double share = static_cast<double>(count) / static_cast<double>(size);
        double reached = above;
        int64_t place = 0;
        for (; place < size - 1; ++place) {
            reached += share * (BY_MASS ? static_cast<double>(sorted[place]) : 1.0);
            if (reached >= goal) break;
        }
        if (size == count) return sorted[place];
        if (misled) place = size / 2;

        const float high = place < spread ? __builtin_inff() : sorted[place - spread];
        const float low = place + spread >= size ? -__builtin_inff() : sorted[place + spread];
        double over;
        bool found = false;
        int64_t taken = take_between<BY_MASS>(values, count, low, high, next, &over);
        const double within = BY_MASS ? sum_of(next, taken) : static_cast<double>(taken);
        if (above + over >= goal && high < __builtin_inff()) {
            taken = take_beyond<false>(values, count, high, next);
        } else if (above + over + within >= goal || low == -__builtin_inff()) {
            if (low == high) return low;
            above += over;
            found = true;
        } else {
            above += over + within;
            taken = take_beyond<true>(values, count, low, next);
            if (taken == 0) return low;
        }
        misled = !found && !misled;
        if (2 * taken > count && !misled) spread /= 2;  // many equals: down to one value, which always leaves less
        values = next;
        next = other;
        other = const_cast<float*>(values);
        count = taken;
    }
}
