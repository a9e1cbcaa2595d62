"""The load generator, usable against any OpenAI-compatible server, and the in-process throughput benchmark.

    workload   what is asked: prompts of exact lengths, with a shared prefix or without
    arrival    when it is asked: open loop (Poisson) or closed loop
    client     asks, and records when each token arrived (http: the wire below it)
    metrics    records → TTFT, ITL, TPOT, E2E, throughput, goodput
    report     metrics → JSON and a table, with the machine and the cost of the generator itself
    compare    two interleaved series → a ratio, its spread, and whether it decides anything
    offline    the same workload through `penstock.LLM`, without HTTP
    server     a server process to measure; startup: how long it takes to become ready

Times are seconds from one clock (`time.perf_counter`); tables show milliseconds.
"""
