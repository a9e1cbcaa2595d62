// A mixture of experts: routing, and the products of all experts that some token goes to, as tiles of one parallel region.
//
//     ExpertWork work(layer, tokens);
//     work.use(memory);                                           // work.bytes(), aligned to 64 bytes
//     run_team([&](Team& team) { work.run(team, x, logits, output, accumulate); });
#pragma once

#include "kernels.h"
#include "layer.h"
#include "team.h"

namespace penstock {

// gate_up: [2 * I, H], the gate's I output features first. down: [H, I].
struct Expert {
    const LinearLayer* gate_up;
    const LinearLayer* down;
};

// Experts first_expert … first_expert + num_present - 1 of num_experts; the others are some other process's and count as zero here.
// renormalize: the weights of a token's experts add up to one; otherwise they are shares of a softmax over all experts.
struct ExpertLayer {
    int32_t num_experts, first_expert, num_present, per_token, renormalize;
    int64_t hidden_size, intermediate_size;
    const Expert* experts;
};

// One step of one layer. A pair is a token and one of its experts; pairs are put in order by expert, so that each expert has consecutive rows.
//
//     memory:  chosen | weights | places | tokens of pairs | experts of pairs | active experts | gate_up, then results | input rows | … of down
class ExpertWork {
  public:
    ExpertWork(const ExpertLayer& layer, int64_t tokens);

    // How much memory it needs, whatever experts tokens choose.
    int64_t bytes() const;
    void use(void* memory);

    // Every thread of the team calls this. x and output [tokens, H], logits [tokens, num_experts]: output (+)= the weighted sum of what each
    // token's experts give. Only weights of experts that some token goes to are read.
    void run(Team& team, const float* x, const float* logits, float* output, bool accumulate);

  private:
    // An expert with tokens. Products point into the inputs beside them. Ends of tiles are counted over the experts before it as well.
    struct Active {
        int64_t start, count;  // of its pairs
        LayerInput gate_up_input, down_input;
        LayerProduct gate_up, down;
        int64_t gate_up_end, down_end;
    };

    void route(const float* logits, int64_t token);
    void arrange();
    void plan(Active& active, const Expert& expert, char* inputs, char* down_inputs);
    void run_tile(int64_t tile, LayerProduct Active::*product, int64_t Active::*end) const;

    const ExpertLayer& layer_;
    const int64_t tokens_;
    int64_t pairs_ = 0;
    int32_t num_active_ = 0;
    int32_t* chosen_ = nullptr;         // [tokens, per_token]: experts
    float* weights_ = nullptr;          // [tokens, per_token]
    int32_t* places_ = nullptr;         // [tokens, per_token]: the pair's place in the order; -1: the expert is not here
    int32_t* pair_token_ = nullptr;     // [pairs]
    int32_t* pair_active_ = nullptr;    // [pairs]: place in active_
    Active* active_ = nullptr;          // [num_present]
    float* gate_up_ = nullptr;          // [pairs, 2 * I], and when it has been used [pairs, H], what experts give
    char* inputs_ = nullptr;
    char* down_inputs_ = nullptr;
};

}  // namespace penstock
