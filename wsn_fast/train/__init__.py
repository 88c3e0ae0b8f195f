"""The thin driver behind ``wsn-fast``: a stream of tasks, the paper's recipe, checkpoints, metrics, plots."""
