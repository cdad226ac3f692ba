"""Runs scenarios, as one process or as a rank under torchrun.

usage: SCENARIO_OUTPUT=folder python run_scenarios.py subject... [--only name]

The subject ``fsdp`` is the file ``fsdp_scenarios.py``. Every scenario for this number of processes runs, except those that must
run alone. The result of each is saved as ``<scenario>-<rank>.pt``.
"""

import argparse
import importlib
import os

import ignite.distributed as idist
import torch
from scenarios import OUTPUT, SCENARIOS, rank, world_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("subjects", nargs="+")
    parser.add_argument("--only")
    arguments = parser.parse_args()
    for subject in arguments.subjects:
        importlib.import_module(f"{subject}_scenarios")
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        idist.initialize("gloo")
    for name, scenario in SCENARIOS.items():
        if name == arguments.only or (not arguments.only and not scenario.alone and world_size() in scenario.world_sizes):
            torch.manual_seed(rank())
            torch.save(scenario.function(), OUTPUT / f"{name}-{rank()}.pt")
    if "RANK" in os.environ:
        idist.finalize()


if __name__ == "__main__":
    main()
