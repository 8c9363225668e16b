"""A run of several variants in one process: measured one by one, recorded at once, compared at the end."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import time
import traceback
from typing import Any

from host_harness import small_models

from . import e2e_files, e2e_measure, e2e_model, e2e_profile, e2e_table, results
from .e2e_host import Host
from .e2e_variants import REFERENCE, Variant

TEXT_TOKENS, SMALL_TEXT_TOKENS = 256, 16
SWITCHING_S = 1.0  # from a variant to its base
PROFILE_S = 15.0  # beside its calls: starting the profiler, reading what it has recorded


class Run:
    """options: as `e2e.parse` returns them. started: when their budget began, by `time.perf_counter`."""

    def __init__(self, options: argparse.Namespace, host: Host, started: float):
        self.options, self.host = options, host
        self._end = math.inf if options.budget is None else started + options.budget
        size = small_models.SMALL if options.tiny else small_models.FULL
        if options.layers:
            size = dataclasses.replace(size, layers=options.layers)
        if options.tiny:
            from host_harness.small_ideogram4.patch import patch

            patch()
        stem = (
            "e2e"
            + "_tiny" * options.tiny
            + "_fast_disk" * options.fast_disk
            + (f"_{options.layers}_layers" if options.layers else "")
        )
        self.csv, self.json = options.out / f"{stem}.csv", options.out / f"{stem}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        results.check_columns(self.csv, e2e_table.COLUMNS)  # before anything takes time
        self.environment = environment(host)
        self.model = e2e_model.Model(size, host.device)
        self.files = e2e_files.Files(self.model, options.workdir / "models")
        same = {key: str(value) for key, value in self.environment.items() if key != "date"}
        same |= {"model": repr(self.model), "steps": str(options.steps)}
        self.references = e2e_measure.References(options.workdir / f"{stem}_references.pt", same)
        self.rows: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        self.left_out: list[str] = []
        self._seconds: dict[tuple[str, int], float] = {}

    def measure_all(self) -> int:
        """Every variant at every size. Returns 1 if one of them failed."""
        if self.references.stored and all(variant.name != REFERENCE for variant in self.options.variants):
            print(f"errors refer to {REFERENCE} of an earlier run on this machine")
        try:
            for variant in self.options.variants:
                for free_vram_gb in self.options.free_vram_gb:
                    self.host.leave_free(free_vram_gb)
                    for size in self.options.size:
                        self._stage(variant, size, free_vram_gb)
        finally:
            self.files.remove()
            self._save()
            self._report()
        return 1 if self.failed else 0

    def _stage(self, variant: Variant, size: int, free_vram_gb: float | None) -> None:
        name = f"{variant.name} at {size}{with_free(free_vram_gb)}"
        if not self._fits(name, self._expected_s(size)):
            return
        print(f"\n{name}", flush=True)
        start = time.perf_counter()
        try:
            self._measure(variant, size, free_vram_gb)
        except Exception as error:  # the other variants are worth their time all the same
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}"
        self._save()
        self.host.cleanup()
        self._seconds[variant.name, size] = time.perf_counter() - start

    def _measure(self, variant: Variant, size: int, free_vram_gb: float | None) -> None:
        options, start = self.options, time.perf_counter()
        files = self.files.prepare(variant.file)
        loras = self.files.lora_names(variant.loras)
        row = {"variant": variant.name, "size": size, "free_vram_gb": free_vram_gb}
        row["files_s"] = time.perf_counter() - start
        tokens = SMALL_TEXT_TOKENS if options.tiny else TEXT_TOKENS
        sampler = e2e_measure.Sampler(self.host, size, options.steps, tokens, self.model.size.llm)
        with variant.computing():
            with e2e_measure.MemoryWatch(self.host) as watch:
                models, base, row["load_s"] = e2e_measure.load(variant, self.host, files, loras)
                numbers, sampled, single = e2e_measure.measure(models, sampler, watch)
            if variant.base == REFERENCE:
                self.references.set(size, variant.loras, single.velocity, sampled.latent)
            row |= numbers | self.references.errors(size, variant.loras, single.velocity, sampled.latent)
            expected_s = 2 * e2e_measure.ROUNDS * ((1 + e2e_measure.STEPS_OF_ROUND) * row["step_s"] + SWITCHING_S)
            if not variant.is_base and self._fits(f"{variant.name} beside its base at {size}", expected_s):
                row |= e2e_measure.beside_base(models, base, sampler)
            self._record(row)
            if variant.name in options.profile and self._fits(
                f"profile of {variant.name} at {size}", 10 * row["call_s"] + PROFILE_S
            ):
                self._profile(models[0], sampler, row)
            if options.alternate and self._fits(
                f"calls in turn of {variant.name} at {size}", 2 * options.alternate * row["step_s"] + PROFILE_S
            ):
                row["alternate"] = e2e_profile.alternate(models, sampler, options.alternate)
                print(f"  in turn: {json.dumps(row['alternate'])}")
            del models, base
            if options.cold and free_vram_gb == options.free_vram_gb[0]:  # the disk is as slow with less memory
                self.host.cleanup()
                row |= e2e_measure.cold(variant, sampler, files, loras)
                print(f"  cold: {', '.join(f'{key} {row[key]:.1f}' for key in e2e_measure.COLD)}", flush=True)

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        results.append(self.csv, e2e_table.COLUMNS, [e2e_table.csv_row(self.environment, row)])
        print(
            "  " + ", ".join(f"{head} {e2e_table.shown(row[key], n)}" for head, key, n in e2e_table.PRINTED), flush=True
        )

    def _profile(self, model, sampler: e2e_measure.Sampler, row: dict[str, Any]) -> None:
        row["profile"] = e2e_profile.profile(model, sampler)
        path = self.options.out / f"{self.csv.stem}_profile_{row['variant']}_{row['size']}.md"
        text = e2e_profile.markdown(row["variant"], row["size"], row["profile"], self.environment)
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(self.environment | row["profile"], indent=1), encoding="utf-8")
        print(text)

    # What fits

    def _expected_s(self, size: int) -> float:
        """As long as the longest variant so far took, at this size if there is one; the reference's file is twice the
        size of any other's."""
        others = {key: seconds for key, seconds in self._seconds.items() if key[0] != REFERENCE} or self._seconds
        same_size = [seconds for (_, other), seconds in others.items() if other == size]
        return max(same_size or others.values(), default=0.0)

    def _fits(self, what: str, expected_s: float) -> bool:
        left = self._end - time.perf_counter()
        if left < expected_s or left <= 0:
            self.left_out.append(f"{what}: would take about {expected_s:.0f} s, {max(0.0, left):.0f} s are left")
            return False
        return True

    # What is told

    def _save(self) -> None:
        """This run at the end of the JSON file's list of runs."""
        runs = json.loads(self.json.read_text(encoding="utf-8")) if self.json.exists() else []
        runs = [run for run in runs if run["environment"]["date"] != self.environment["date"]]
        runs.append(
            {
                "environment": self.environment,
                "host": self.host.describe(),
                "layers": self.model.size.layers,
                "steps": self.options.steps,
                "cold": self.options.cold,
                "rows": self.rows,
                "failed": self.failed,
                "left_out": self.left_out,
            }
        )
        new = self.json.with_suffix(".json.new")
        new.write_text(json.dumps(runs, indent=1), encoding="utf-8")
        os.replace(new, self.json)

    def _report(self) -> None:
        for free_vram_gb, size in itertools.product(self.options.free_vram_gb, self.options.size):
            rows = [row for row in self.rows if (row["size"], row["free_vram_gb"]) == (size, free_vram_gb)]
            if not rows:
                continue
            title = f"{size}x{size}{with_free(free_vram_gb)}, GB and seconds"
            print(f"\n{title}; /bf16 and the like: how many times faster a step is\n")
            print(e2e_table.table(rows))
            unlimited = [row for row in self.rows if (row["size"], row["free_vram_gb"]) == (size, None)]
            asked = list(e2e_table.demands(rows, size, free_vram_gb, unlimited))
            if asked and not (self.options.tiny or self.options.layers):
                print(f"\n{e2e_table.verdicts(asked)}")
        if self.rows:
            self._draw()
        for text in self.left_out:
            print(f"left out: {text}")
        for name, text in self.failed.items():
            print(f"failed: {name}: {text}")

    def _draw(self) -> None:
        picture = self.csv.with_suffix(".png")
        try:
            e2e_table.draw(self.csv, picture)
            print(f"\ndrawn: {picture}")
        except (ImportError, ValueError) as error:
            print(f"\nnot drawn: {picture}: {error}")


def with_free(free_vram_gb: float | None) -> str:
    return "" if free_vram_gb is None else f" with {free_vram_gb:g} GB free"


def environment(host: Host) -> dict[str, str]:
    """The columns that all rows of one run share."""
    return results.environment(None if host.cuda else "cpu") | {"comfyui": host.version}
