"""The paper's benchmarks: data sets in the layouts their authors publish, and what is asked of them."""
