"""Keeps a run safe, seen and repeatable. PPO, the policies and the environments are not in here.

config, checkpoint, run, run_folder,
files, errors, signals                      a run: its settings, its files, its begin, its end and what comes between
processes, device                           many processes that learn as one; GPU, threads, bfloat16, memory
workers                                     the processes that play: none outlives the trainer, what fails is named
tracking, terminal, diagnostics             metrics.csv and MLflow; the live line; what curves that go wrong mean
outbox, mlflow_model, policy_model, flight  what is sent to MLflow: scored policies, the best one to be loaded anywhere
search, search_report, parent_run           what a sweep tries next, by Optuna; the MLflow run that holds its runs
video, panel, watch, drawing, publish       landings filmed or live, with a policy's instruments; pages of results/
"""

import sys

if sys.platform == "win32":  # before anything is imported that fails there
    sys.exit("Windows lacks some of what this program needs; it runs in the Windows Subsystem for Linux (WSL)")
