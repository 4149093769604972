"Side measurements of the experiments, run by hand from the root of the repository: `python -m experiments.scripts.NAME`; what they write is in results/."
