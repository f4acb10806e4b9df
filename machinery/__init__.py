"""Keeps a run safe, seen and repeatable. PPO, the policies and the environments are not in here.

config, checkpoint, run, files, signals     a run: its settings, its files, its begin, its end and what comes between
processes, device                           many processes that learn as one; GPU, threads, bfloat16, memory
workers                                     the processes that play: none outlives the trainer, what fails is named
tracking, terminal, diagnostics             metrics.csv and MLflow; the live line; what curves that go wrong mean
video, panel, drawing, publish              landings filmed, with a policy's instruments; pages under results/
"""
