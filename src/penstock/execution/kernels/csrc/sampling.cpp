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

}  // namespace

PENSTOCK_EXPORT void penstock_sample(const penstock::SampleCall* call) { run_rows(*call, penstock::kernels().sample_row); }

PENSTOCK_EXPORT void penstock_logprobs(const penstock::LogprobCall* call) { run_rows(*call, penstock::kernels().logprob_row); }
