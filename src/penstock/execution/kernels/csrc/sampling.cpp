// Sampling for Python: the rows of a step, shared among the threads.
#include "kernels.h"
#include "team.h"

namespace {

// With fewer logits than this, waking other threads takes longer than the work.
constexpr int64_t SHARED_FROM_LOGITS = 65536;

template <class Call> void run_rows(const Call& call, void (*row)(const Call&, int64_t)) {
    if (call.rows == 1 || call.rows * call.vocab_size < SHARED_FROM_LOGITS) {
        for (int64_t index = 0; index < call.rows; ++index) row(call, index);
        return;
    }
    penstock::run_team([&](penstock::Team& team) { team.for_tiles(call.rows, [&](int64_t index) { row(call, index); }); });
}

// Subtracting keeps what is not a number, and makes what is infinite none.
void mask_row(const penstock::MaskCall& call, int64_t index) {
    static constexpr float PENALTIES[2] = {__builtin_inff(), 0.0f};
    float* const logits = call.logits + call.logit_rows[index] * call.stride;
    const uint8_t* const bits = call.bits + index * call.mask_bytes;
    for (int64_t byte = 0; byte < call.mask_bytes; ++byte) {
        if (bits[byte] == 0xff) continue;
        const int64_t first = 8 * byte, count = call.vocab_size - first < 8 ? call.vocab_size - first : 8;
        for (int64_t bit = 0; bit < count; ++bit) logits[first + bit] -= PENALTIES[bits[byte] >> bit & 1];
    }
}

}  // namespace

PENSTOCK_EXPORT void penstock_sample(const penstock::SampleCall* call) { run_rows(*call, penstock::kernels().sample_row); }

PENSTOCK_EXPORT void penstock_logprobs(const penstock::LogprobCall* call) { run_rows(*call, penstock::kernels().logprob_row); }

PENSTOCK_EXPORT void penstock_mask_logits(const penstock::MaskCall* call) { run_rows(*call, mask_row); }
