"""Attack certified patches below and above their certified radius, and take the vote on each to a proof.

    python benchmarks/certified_attacks.py DATA WORK -c CLASSIFIER --t-star T --radius R [-n 64]

The attacks are PGD and APGD in l2, with exact gradients averaged over draws, at multiples of the radius R. No vote of a
patch that is certified at R may change at R or below, but for the probability alpha of each certificate. How many
change above it tells how far the certificates are from what attacks find.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from advdiff_cli.evaluation.statistics import wilson

FACTORS = (0.5, 1.0, 1.5, 2.0, 4.0)
METHODS = ("pgd", "apgd")


def advdiff(*arguments):
    command = [sys.executable, "-m", "advdiff_cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def lines(path):
    with path.open(newline="") as file:
        return {line["index"]: line for line in csv.DictReader(file)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("work", type=Path)
    parser.add_argument("-c", required=True)
    parser.add_argument("--t-star", required=True)
    parser.add_argument("--radius", type=float, required=True)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eot", type=int, default=8)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    model = ["-c", asked.c, "-m", "pcam-ddpm", "--t-star", asked.t_star]
    rows = ["--limit", asked.n, "--shuffle-seed", 0]
    proved = asked.work / "proved.csv"
    advdiff("certify", asked.data, *model, *rows, "--radius", asked.radius, "-o", proved)
    certified = {k: line for k, line in lines(proved).items() if float(line["radius"]) >= asked.radius}
    right = sum(line["decision"] == line["label"] for line in certified.values())
    print(f"{len(certified)} of {asked.n} patches certified at l2 {asked.radius:g}, {right} of them right")
    print("method  radius  times  certified patches: vote proved changed, % [95 %]  undecided")
    for method in METHODS:
        for factor in FACTORS:
            eps, name = factor * asked.radius, f"{method}-{factor:g}"
            adv, votes = asked.work / f"{name}.h5", asked.work / f"{name}.csv"
            attack = ["--method", method, "--norm", "l2", "--eps", eps, "--steps", asked.steps, "--eot", asked.eot]
            advdiff("attack", asked.data, *model, *rows, *attack, "-o", adv)
            advdiff("certify", adv, *model, "--radius", 0, "-o", votes)
            found = {k: line for k, line in lines(votes).items() if k in certified}
            decided = {k: line for k, line in found.items() if line["abstain"] == "0"}
            changed = sum(line["decision"] != certified[k]["decision"] for k, line in decided.items())
            share = wilson(changed, len(found))
            print(
                f"{method:6}  {eps:6.3f}  {factor:5g}  {changed:3}  {share}  {len(found) - len(decided):3}", flush=True
            )


if __name__ == "__main__":
    main()
