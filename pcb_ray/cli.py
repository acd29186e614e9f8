"""The command line: `pcb-ray plan | merge | search | sweep | verify | submit`. Exit code 0 done, 1 failed, 2 the request or an
input was wrong."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.checks import size_of, without_secrets
from pcb_ray.errors import RequestError, RunError
from pcb_ray.estimate import EXAMPLE, SHARE_OF_WORKERS, Cluster, Estimate, estimate
from pcb_ray.files.objects import object_problem
from pcb_ray.files.store import as_path, is_remote
from pcb_ray.methods import METHODS, Method, Parameter, names, variants_of
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Plan
from pcb_ray.progress import readable_bytes


def _recipe_help() -> str:
    """What a recipe is, with the methods and their parameters as their records tell."""
    of_parameter: dict[str, list[Method]] = {}
    for method in METHODS:
        for name in method.parameters:
            of_parameter.setdefault(name, []).append(method)
    lines = []
    for name, methods in of_parameter.items():
        known = methods[0].parameters[name]
        users = ", ".join(dict.fromkeys(method.name for method in methods))
        own = "; models may have their own" if known.per_model else ""
        lines.append(f"    {name + ': ' + str(known.default):26} # {known.help} ({users}{own})")
    by_method = "; ".join(f"{' | '.join(of)} ({name})" for name, of in _with_variants().items())
    lines.append(f"    {'variant: ' + METHODS[0].variant:26} # {by_method}")
    table = [
        textwrap.fill(method.formula, 130, initial_indent=f"  {method.name:16} {method.variant:9} ", subsequent_indent=" " * 29)
        for method in METHODS
    ]
    return "\n".join(
        [
            "Methods, and their variants:",
            "",
            *table,
            "",
            "A recipe is a YAML file:",
            "",
            f"  {'merge_method: ' + METHODS[0].name:28} # {' | '.join(names())}, or my_methods.py:name",
            "  base_model: models/base      # a directory, a .safetensors file, or a Hub id (org/name@revision)",
            "  models:",
            "    - model: models/math",
            "      parameters: {weight: 1.0} # lambda_i; or by tensor name: [{filter: mlp, value: 0.5}, {value: 1.0}]",
            "    - model: models/code",
            "  parameters:",
            *lines,
            "  dtype: bfloat16              # of the output; by default the base's",
            "  exclude: ['*.rotary_emb.*']  # tensors that stay the base's, by name",
            "  tokenizer_source: base       # or one of the models, as it stands there",
            "  chat_template: '{{ ... }}'   # a Jinja template in the place of the tokenizer's",
            "",
            "`search:` and `sweep:` sections are for those commands (pcb-ray search --help, pcb-ray sweep --help).",
        ]
    )


MERGE_HELP = """\
Without --address a local Ray is started for the merge; inside a Ray job the job's cluster is used:

  pcb-ray merge recipe.yaml merged
  ray job submit --address http://head:8265 --working-dir . -- pcb-ray merge recipe.yaml /shared/merged

The output appears under its name only when whole; in an object store (OUT is s3://bucket/name, or gs, az) its receipt, which comes
last, says that it is; on the Hub (hf://org/name@branch) it is one commit. After a crash or Ctrl-C, the same command with --resume
goes on where it stopped, from any machine.
With --resume it may simply be run again, as schedulers do: it starts, goes on, or ends with 0 if OUT is this very merge already.
The bytes are the same whatever --workers and --memory are.

Several merges in one job, by the same workers, which read once what they share:

  pcb-ray merge A.yaml B.yaml --into merges     # merges/A and merges/B

A recipe may have a grid there, of `method`, `variant` and the method's parameters; each point is a merge of its own:

  grid: {density: [0.1, 0.2], lambda: [0.5, 1.0]}     # merges/A/density=0.1,lambda=0.5 and so on

Each output appears as soon as it is whole, and one that fails takes no other along. --resume skips those that are there. The exit
code is 0 if all are done, else 1 if any failed, else 2 (wrong requests only).
"""


SEARCH_HELP = """\
The recipe has a section more. All keys but `evaluator` (and `metric`, for one of your own) may be left out; shown are their
defaults, or an example where it says optional:

  search:
    evaluator: my_eval.py:Accuracy      # load(model_dir) -> torch.nn.Module, score(split) -> dict of numbers; or built in:
    #   causal_lm: {data: {val: val.txt, test: test.txt}}       loss and perplexity of text, JSONL or parquet
    #              length (512), batch, text (the field), tokens (at most), dtype
    #   classification: {data: {val: val.jsonl, test: test.jsonl}}    text, label (the fields), length, batch, dtype
    #   lm_eval: {tasks: {val: [my_task], test: [arc_easy]}}    EleutherAI's harness (pip install 'pcb-ray[lm-eval]')
    #            include_path (of task files), num_fewshot, limit, chat_template, batch, dtype
    #   command: {run: "python eval.py {model} {split}"}        gets a model directory, prints JSON last; scratch, timeout
    metric: accuracy                    # of what `score` returns; of causal_lm and classification: loss, accuracy
    mode: max                           # max | min
    split: {search: val, report: test}  # `report` is scored only for base, experts, start and winner
    space:
      weight: {lower: 0.0, upper: 2.0}  # lambda_i of each model; init: the recipe's weight
      groups: {attention: "*self_attn*", mlp: "*mlp*", layers: 4}   # optional: coefficients of their own, by tensor name and depth
PARAMETERS
    optimizer: CMA                      # CMA-ES, or another of Nevergrad's by name
    budget: 100                         # candidates
    population: 8                       # candidates that are asked at a time, and told together
    concurrency: auto                   # trials at a time: as many as the cluster holds
    resources_per_trial: {cpu: 1, gpu: 0, memory: 16GB}   # memory: by default the model in float32, without a GPU
    trial_timeout: 600                  # seconds; optional
    loggers: [tensorboard, {wandb: {project: merges}}]    # optional; mlflow too. Keys of services belong in the environment
    seed: 0                             # decides the candidates, on any number of workers

OUT holds the merged winner, best_recipe.yaml (an ordinary recipe), trials.parquet, report.html and the Tune experiment.
Each model is read for the analysis only; a candidate updates a model that stays loaded. --resume goes on after a crash with the
same candidates.
"""

SWEEP_HELP = """\
The recipe has a `search:` section that names the evaluator and the metric (see pcb-ray search --help), and a grid:

  sweep: {density: [0.05, 0.1, 0.2], lambda: [0.8, 1.0, 1.2]}

Its axes are the parameters that a search of the method can vary: PARAMETERS.

OUT holds the table (sweep.parquet), a heat map (sweep.png), report.html and best_recipe.yaml.
"""

SUBMIT_HELP = """\
The command runs as a job on the cluster whose dashboard has this address, as it would run there by hand; its log is shown here:

  pcb-ray submit recipe.yaml /shared/merged --address http://head:8265 --workers 16     # a merge, where no command is named
  pcb-ray submit search recipe.yaml s3://bucket/best --resume
  pcb-ray submit verify /shared/merged
  pcb-ray submit --follow pcb-ray-merge-1a2b3c4d                                        # shows the log again, from its start

All options that are not listed here are those of the command (pcb-ray merge --help). OUT is an absolute path or a URI.

The recipe is sent, with the files that it names by paths relative to its folder: evaluators and methods (and what these import from
there), an evaluator's data, files named in its command; code outside of that folder only with --allow-code. The file of verify's
--method is sent too. Less than 100 MB in all. Models are never sent: name them by absolute paths that all nodes see, URIs, Hub ids.

When the connection drops, it is tried again for 10 minutes, and no line is lost or shown twice. Ctrl-C asks whether to stop the job
or to leave it. Exit code: that of the command on the cluster (0 done, 1 failed, 2 the request or an input was wrong); 143 if the
job was stopped, 137 if its driver was killed, 130 if this command was interrupted and the job goes on.

With RAY_AUTH_MODE=token the token in ~/.ray/auth_token (or RAY_AUTH_TOKEN_PATH, or RAY_AUTH_TOKEN) is shown to the dashboard.
Needs ray[default].
"""


def _search_help() -> str:
    lines = []
    for name, parameter in _searched().items():
        bounds = f"{name}: {{lower: {parameter.range[0]:g}, upper: {parameter.range[1]:g}}}"
        lines.append(f"      {bounds:61} # optional; {parameter.help}; init: the recipe's")
    lines += [
        f"      {'variant: [' + ', '.join(of) + ']':61} # optional ({name})"
        for name, of in _with_variants().items()
        if all(m.linear for m in of.values())
    ]
    return SEARCH_HELP.replace("PARAMETERS", "\n".join(lines))


def _with_variants() -> dict[str, dict[str, Method]]:
    """By name the methods that have variants to choose from."""
    return {name: of for name in names() if len(of := {v: m for v, m in variants_of(name).items() if v}) > 1}


def _sweep_help() -> str:
    return SWEEP_HELP.replace("PARAMETERS", ", ".join([*_searched(), "variant"]))


def _searched() -> dict[str, Parameter]:
    """The parameters that a search can vary, of all methods."""
    return {name: p for method in METHODS for name, p in method.parameters.items() if p.searched}


def size(text: str) -> int:
    value = size_of(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB, 2GB or 1.5GiB")
    return value


def recipe_name(text: str) -> str | Path:
    name = as_path(text)
    return name if is_remote(name) else Path(name)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def cluster(text: str) -> Cluster:
    try:
        return Cluster.parse(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(" ".join(error.problems)) from None


class _Pairs(argparse.Action):
    """KEY=VALUE, as often as wanted."""

    def __call__(self, _parser: object, options: argparse.Namespace, text: Any, _option: object = None) -> None:
        key, equals, value = text.partition("=")
        found = {**(getattr(options, self.dest) or {})}
        try:
            value = value if self.dest == "labels" else float(value)
        except ValueError:
            equals = ""
        if not key or not equals or key in found:
            raise argparse.ArgumentError(self, f"wanted {self.metavar}, each once, found {text!r}")
        setattr(options, self.dest, {**found, key: value})


class _Parser(argparse.ArgumentParser):
    """With `submits`, it takes its own options and leaves the rest to the parser of the command that is submitted."""

    submits: Mapping[str, argparse.ArgumentParser] | None = None

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        options, words = super().parse_known_args(args, namespace)
        if self.submits is None:
            return options, words
        if options.follow is not None:
            if words:
                self.error(f"--follow takes no command, found {' '.join(words)}")
        elif not words:
            self.error("a RECIPE and OUT, a command, or --follow JOB is required")
        else:
            if words[0] not in self.submits:
                words = ["merge", *words]
            options.submitted = self.submits[words[0]].parse_args(words[1:])
        options.words = words
        return options, []


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pcb-ray",
        description="Merge fine-tuned models of one base by PCB-Merging on Ray: thresholds exact over the whole model,\n"
        "bounded memory, the same bytes on any number of workers, resumable.",
        epilog=_recipe_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="plan | merge | search | sweep | verify | submit", parser_class=_Parser
    )
    form = argparse.RawDescriptionHelpFormatter

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=form)

    plan = command("plan", "Tell what a merge will do, from headers and samples, in seconds; nothing is written.", _recipe_help())
    plan.add_argument("recipe", metavar="RECIPE", type=recipe_name, help="the recipe, a YAML file, or its URI")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument(
        "--cluster",
        type=cluster,
        metavar="KEYS",
        help=f"also tell what the merge would take on nodes like these, by rates that are measured here: {EXAMPLE} (of each; "
        "disk may be left out: it is for scratch, or the file system of local paths)",
    )

    merge = command("merge", "Merge the models of RECIPE into the directory OUT.", MERGE_HELP + "\n" + _recipe_help())
    merge.usage = "pcb-ray merge RECIPE OUT [options]\n       pcb-ray merge RECIPE [RECIPE ...] --into DIR [options]"
    merge.add_argument("recipe", metavar="RECIPE", type=recipe_name, help="the recipe, a YAML file, or its URI")
    merge.add_argument(
        "more",
        metavar="OUT",
        nargs="*",
        help="the directory to make, which transformers loads; or s3://bucket/name (gs, az), or hf://org/name",
    )
    merge.add_argument("--into", metavar="DIR", help="merge each recipe into DIR, to a directory that is named after it")
    merge.set_defaults(refuse=merge.error)
    merge.add_argument("--workers", type=count, metavar="N", help="workers (default: one per core or GPU of the cluster)")
    merge.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="where to compute (default: cpu; auto: a GPU where there is one; no GPU has run this yet)",
    )
    merge.add_argument("--address", help="a Ray cluster to join, such as ray-head:6379 (default: start a local one)")
    merge.add_argument(
        "--resume",
        action="store_true",
        help="go on with an unfinished merge to OUT; only what is missing is done, and nothing if OUT is this very merge",
    )
    merge.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it exists (when the new one is whole), and forget an unfinished merge to it",
    )

    search = command("search", "Search the coefficients of RECIPE, and merge the best into the directory OUT.", _search_help())
    sweep = command("sweep", "Score a grid of the method's parameters and variants.", _sweep_help())
    for one, made in (search, "the merged winner and the report"), (sweep, "the table and the report"):
        one.add_argument("recipe", metavar="RECIPE", type=recipe_name, help="the recipe, a YAML file, or its URI")
        one.add_argument(
            "out", metavar="OUT", help=f"the directory to make, that all nodes see; or s3://bucket/name (gs, az): {made}"
        )
        one.add_argument(
            "--workers", type=count, metavar="N", help="workers of the analysis (default: one per core of the cluster)"
        )
        one.add_argument("--address", help="a Ray cluster to join, such as ray-head:6379 (default: start a local one)")
        one.add_argument(
            "--resume",
            action="store_true",
            help="go on with an unfinished run; nothing is scored again, or done at all if OUT is this very one",
        )
        one.add_argument("--overwrite", action="store_true", help="replace OUT if it exists, and forget an unfinished run")

    for one in merge, search, sweep:
        one.add_argument(
            "--cache",
            type=size,
            metavar="SIZE",
            help="memory of each node for what is fetched from object stores (default: half of what is free)",
        )
        one.add_argument("--scratch", default="", metavar="DIR", help="a folder on a disk of each node for what does not fit there")
        one.add_argument("--scratch-size", type=size, metavar="SIZE", help="bound on it (default: nine tenths of what is free)")
    merge.add_argument(
        "--state", default="", metavar="DIR", help="where the state of a run to hf:// lies: a folder (default: RECIPE's), or a URI"
    )
    merge.add_argument("--pull-request", action="store_true", help="end a merge to hf://org/name with a pull request")
    for one in merge, search, sweep:
        one.add_argument(
            "--label",
            dest="labels",
            action=_Pairs,
            metavar="KEY=VALUE",
            help="workers, and trials, go to nodes with this label only (may be repeated): LABEL, !LABEL or in(LABEL,...)",
        )
        one.add_argument(
            "--resource",
            dest="resources",
            action=_Pairs,
            metavar="NAME=AMOUNT",
            help="a custom resource that each worker, and each trial, takes of its node (may be repeated)",
        )
    for one in plan, merge, search:
        one.add_argument(
            "--max-shard-size",
            type=size,
            default=DEFAULT_SHARD_BYTES,
            metavar="SIZE",
            help="largest file of the output (default: 5GB)",
        )
    for one in plan, merge, search, sweep:
        one.add_argument(
            "--memory", type=size, metavar="SIZE", help="bound on a worker's anonymous memory, torch included, such as 2GB"
        )

    for one in plan, merge, search, sweep:
        one.add_argument(
            "--allow-code",
            action="store_true",
            help="run a method or evaluator that RECIPE names also if it is a module, or a file outside of RECIPE's folder; any "
            "where RECIPE lies in a store",
        )

    verify = command("verify", "Check a merged directory: all digests, and a sample of parts recomputed from the inputs.", "")
    verify.add_argument(
        "out", metavar="OUT", help="what pcb-ray merge wrote: a directory, s3://bucket/name (gs, az), or hf://org/name"
    )
    verify.add_argument(
        "--method",
        metavar="FILE[:NAME]",
        help="the code of a method of one's own, the same as merged: what OUT holds or names is not run",
    )
    verify.add_argument("--sample", type=count, default=8, metavar="N", help="parts to recompute (default: 8)")
    for one in plan, merge, search, sweep, verify:
        one.add_argument("-v", "--verbose", action="store_true", help="explain what is done")

    submit = commands.add_parser(
        "submit",
        help="Run one of these on a Ray cluster as a job, and follow it.",
        description="Run merge, search, sweep, verify or plan on a Ray cluster as a job, and follow it until it ends.",
        usage="pcb-ray submit [merge | search | sweep] RECIPE OUT [options] [options of the command]\n"
        "       pcb-ray submit verify OUT | plan RECIPE [options] [options of the command]\n"
        "       pcb-ray submit --follow JOB [--address URL]",
        epilog=SUBMIT_HELP,
        formatter_class=form,
        allow_abbrev=False,
    )
    submit.submits = {"merge": merge, "search": search, "sweep": sweep, "verify": verify, "plan": plan}
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard, such as http://head:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or port 8265 here, "
        "where a tunnel may lead to it)",
    )
    submit.add_argument(
        "--include", action="append", default=[], type=Path, metavar="PATH", help="send this file or folder too (may be repeated)"
    )
    submit.add_argument("--no-wait", action="store_true", help="print the job's id and end once it is submitted")
    submit.add_argument("--follow", metavar="JOB", help="show the log of a job that was submitted before, and end as it ends")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pcb_ray").setLevel(logging.INFO if getattr(options, "verbose", False) else logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        commands = {"plan": _plan, "merge": _merge, "search": _search, "sweep": _sweep, "verify": _verify, "submit": _submit}
        return commands[options.command](options)
    except RequestError as error:
        print(f"pcb-ray: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"pcb-ray: {without_secrets(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if is_remote(str(error.filename)):
            print(f"pcb-ray: {object_problem(error.filename, error)}", file=sys.stderr)
            return 1
        kept = "; what was finished is kept: --resume goes on" if "resume" in options else ""
        where = f"{error.filename}: " if error.filename else ""
        print(f"pcb-ray: {where}{error.strerror or error}. Fix: look after the disk and the rights there{kept}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "pcb-ray: interrupted; nothing appears under the output's name, and --resume goes on where it stopped", file=sys.stderr
        )
        return 130


class _Formatter(logging.Formatter):
    """The last net: what others' messages quote, with their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _plan(options: argparse.Namespace) -> int:
    from pcb_ray.planning import plan

    made = plan(options.recipe, max_shard_bytes=options.max_shard_size, allow_code=options.allow_code)
    block = choose_block(made, "cpu", options.memory)
    memory = {"worker_bytes": worker_bytes(made, block), "block_elements": block}
    free = shutil.disk_usage(Path.cwd()).free
    search = None
    if made.recipe.search is not None:
        from pcb_ray.searching.run import announced

        search = announced(made)
    found = None
    if options.cluster is not None:
        from pcb_ray.rates import measured_rates

        if made.views:
            raise RequestError(
                "--cluster: wanted a method that merges element by element, found one that works on whole matrices, whose time is "
                "not reckoned yet. Fix: leave --cluster out; docs/methods.md has what such a method costs."
            )

        found = estimate(made, options.cluster, memory["worker_bytes"], measured_rates(made, block))
    if options.json:
        more = ({"search": search} if search else {}) | ({"cluster": found.summary()} if found else {})
        print(json.dumps(made.summary() | memory | {"disk_free_here": free} | more, indent=2))
    else:
        lines = describe(made, memory["worker_bytes"], free)
        print("\n".join([*lines, *(describe_search(search) if search else []), *(describe_cluster(found) if found else [])]))
    return 0


def describe_search(search: Mapping[str, Any]) -> list[str]:
    """What `pcb-ray search` would do, for people."""
    names, trial = search["coefficients"], search["trial_bytes"]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    memory = (
        f"each trial is given {readable_bytes(trial)} (the model in float32 unless said) and its process"
        if trial
        else "trials take a GPU each"
    )
    return [
        "",
        f"search     {search['budget']} candidates by {search['optimizer']}, {search['population']} asked at a time; "
        f"{_number(len(names), 'coefficient')}: {', '.join(names[:6])}{more}",
        f"basis      at most {readable_bytes(search['basis_bytes'])} beside the output until it is done",
        f"memory     at most {readable_bytes(search['worker_bytes'])} per worker of the analysis; {memory}",
        *(f"note: {note}" for note in search["notes"]),
    ]


def describe_cluster(found: Estimate) -> list[str]:
    """What a merge would take on a cluster, for people: each number with what it is made from."""
    on, size = found.cluster, readable_bytes
    disk = f", {size(on.disk)}/s of disk" if on.disk else ""
    lines = [
        "",
        f"cluster    {_number(on.nodes, 'node')}, each of {_number(on.cores, 'core')}, {size(on.memory_bytes)} of memory, "
        f"{size(on.network)}/s of network{disk}",
        f"workers    {found.workers_per_node} on a node: one per core, in {SHARE_OF_WORKERS:.0%} of {size(on.memory_bytes)} at "
        f"{size(found.worker_bytes)} each; {found.workers:,} in all, for {found.chunks:,} chunks",
        f"memory     {found.workers_per_node} x {size(found.worker_bytes)} + {size(found.kept_in_memory)} kept = "
        f"{size(found.node_bytes)} of {size(on.memory_bytes)}"
        + (": too much, give --workers or --cache" if found.node_bytes > on.memory_bytes else ""),
        f"inputs     {size(found.input_bytes * on.nodes)} / {_number(on.nodes, 'node')} = {size(found.input_bytes)} on each",
    ]
    if found.remote_bytes:
        first, write = found.sweeps[0], found.sweeps[-1]
        lines += [
            f"room       a node keeps {size(found.kept_in_memory)} in memory (of half, {size(found.memory_room)})"
            + (f", {size(found.kept_on_disk)} in --scratch" if on.disk else ""),
            f"fetches    {size(found.fetched_bytes)} on each node: {size(first.received_bytes)} by the first sweep, "
            f"{size(found.fetched_again)} by each other, {size(write.received_bytes)} by the write: "
            f"{_number(found.files, 'file')}, whose inputs other nodes keep too",
        ]
    lines += [
        f"writes     {size(found.written_bytes * on.nodes)} / {_number(on.nodes, 'node')} = {size(found.written_bytes)} on each",
        "",
        f"{'sweep':22} {'seconds':>8}  bound by    how",
    ]
    for one in found.sweeps:
        moved = max(one.received_bytes, one.sent_bytes)
        how = [
            f"network {size(moved)} / {size(on.network)}/s = {_seconds(one.network_s)}" if moved else "",
            f"disk {size(one.disk_bytes)} / {size(on.disk)}/s = {_seconds(one.disk_s)}" if on.disk and one.disk_bytes else "",
            f"arithmetic {_millions(one.busiest_elements)} / {_millions(one.rate)}/s = {_seconds(one.arithmetic_s)}",
        ]
        lines.append(f"{one.name:22} {_seconds(one.seconds):>8}  {one.bound_by:10}  {'; '.join(filter(None, how))}")
    return [
        *lines,
        f"{'in all':22} {_seconds(found.seconds):>8}  (starting, and making the output durable, come on top)",
        "",
        "Network and disk: bytes of a node. Arithmetic: elements of the busiest worker, by the rate of a core here, just measured.",
    ]


def _millions(count: float) -> str:
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} G"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def describe(plan: Plan, worker: int, free: int) -> list[str]:
    """The plan for people."""
    facts = plan.summary()
    lines = [
        f"{plan.method.full_name}: {plan.N} models, D = {plan.D:,} merged elements in {len(plan.tensors)} tensors",
        "",
        "inputs",
    ]
    for k, one in enumerate(facts["inputs"]):
        role = "base" if k == 0 and plan.recipe.base_model is not None else "layout" if k == 0 else f"model {k}"
        commit = f" at {one['commit'][:12]}" if one["commit"] else ""
        told = f": {_number(one['files'], 'file')}, {readable_bytes(one['bytes'])}"
        if k and plan.relation is not None:
            change, untouched = plan.relation.change[k - 1], plan.relation.untouched[k - 1]
            told += f"; differs from the base by {change:.2g} of its length, {untouched:.0%} untouched (sampled)"
        lines.append(f"  {role:8} {one['source']}{commit}{told}")
    for name, parameter in plan.method.parameters.items():
        values = dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in plan.settings.each(name))
        if name == plan.method.scale and plan.recipe.lambda_by_tensor:
            values = dict.fromkeys(f"{value:g}" for value in sorted({t.lambda_ for t in plan.tensors}))
        lines.append(f"{name:10} {', '.join(_some_of(list(values)))}: {parameter.help}")
    lines += _described_matrices(plan) if plan.views else []
    copied = [f"{number} {why}" for why, number in facts["tensors_copied"].items()]
    if copied:
        lines.append(f"copied     {', '.join(copied)} (from the base, as they are)")
        lines += _some([f"  {c['name']}: {c['why']}, {readable_bytes(c['bytes'])}" for c in facts["copied"]])
    lines += [f"tied       {name} = {original}" for name, original in plan.tied]
    lines += [f"copy       {name} = {original}, in the output too" for name, original in facts["copies"].items()]
    lines += [f"untied     {name}" for name in plan.untied]
    lines += [f"left out   {name}: excluded, and not in the base" for name in plan.dropped]
    along = sum(f.size for f in plan.along)
    lines.append(f"beside     {_number(len(plan.along), 'file')} with the tensors, {readable_bytes(along)}")
    lines += _some([f"  {f.name}: {readable_bytes(f.size)}" for f in plan.along])
    lines += ["stays      beside the tensors, and is in no output"] if plan.left_out else []
    lines += _some([f"  {f.name}: {f.left_out}{f', {readable_bytes(f.size)}' if f.size else ''}" for f in plan.left_out])
    lines += [
        f"reads      {readable_bytes(facts['bytes_read'])}: {_number(plan.method.sweeps, 'sweep')} of "
        f"{readable_bytes(plan.sweep_bytes)} in the usual case",
        *(
            [
                f"fetches    {readable_bytes(plan.sweep_bytes)} once, as far as the nodes have room for it in memory or --scratch; "
                f"the rest by each of {plan.method.passes_over_inputs} passes"
            ]
            if plan.is_remote
            else []
        ),
        f"writes     {readable_bytes(plan.written_bytes)} in {_number(len(plan.files), 'file')}; "
        f"{readable_bytes(free)} are free here",
        f"memory     at most {readable_bytes(worker)} per worker (the driver takes less)",
        *(f"note: {note}" for note in plan.notes),
    ]
    return lines


def _described_matrices(plan: Plan) -> list[str]:
    """Which tensors are merged by matrices, which way round, and which are not."""
    shapes = Counter(f"{view.rows} x {view.columns}" for views in plan.views for view in views)
    shown = [f"{count} of {shape}" for shape, count in sorted(shapes.items(), key=lambda one: -one[1])]
    of_matrices = [tensor.name for tensor, views in zip(plan.tensors, plan.views, strict=True) if views]
    turned = [
        t.name for t, views in zip(plan.tensors, plan.views, strict=True) if any(view.down == 1 < view.rows for view in views)
    ]
    rest = [tensor.name for tensor, views in zip(plan.tensors, plan.views, strict=True) if not views]
    lines = [f"calibrate  {plan.recipe.calibrate}: singular values, after the merge"] if plan.recipe.calibrate else []
    lines.append(
        f"matrices   {shapes.total()} in {_number(len(of_matrices), 'tensor')}, outputs x inputs: {', '.join(_some_of(shown))}"
    )
    lines += [f"turned     {_number(len(turned), 'tensor')}, stored inputs x outputs"] if turned else []
    lines += _some([f"  {name}" for name in turned])
    lines += [f"rest       {_number(len(rest), 'tensor')}, not merged as matrices"] if rest else []
    return lines + _some([f"  {name}" for name in rest])


def _some(lines: Sequence[str]) -> list[str]:
    return [*lines[:20], *([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])]


def _some_of(values: list[str]) -> list[str]:
    return values if len(values) <= 6 else [*values[:3], "...", values[-1]]


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _merge(options: argparse.Namespace) -> int:
    how = {**_shared(options), "device": options.device, "max_shard_bytes": options.max_shard_size}
    recipes, out = _recipes_and_out(options)
    if options.into is not None:
        return _merge_many(recipes, out, how)
    from pcb_ray.merging import merge

    receipt = merge(options.recipe, out, state=options.state, pull_request=options.pull_request, **how)
    print(
        f"{out}: {receipt.N} models merged in {receipt.elapsed_s:.1f} s by {receipt.workers} workers; "
        f"read {readable_bytes(receipt.bytes_read)} in {receipt.full_sweeps} full sweeps, wrote "
        f"{readable_bytes(receipt.bytes_written)}; "
        f"a worker took at most {readable_bytes(receipt.peak_worker_bytes)}"
    )
    return 0


def _recipes_and_out(options: argparse.Namespace) -> tuple[list[str | Path], str]:
    """Of a merge: what is to be merged, and where to. Ends the process if there is neither OUT nor --into, or too much."""
    if options.into is not None:
        return [options.recipe, *map(recipe_name, options.more)], options.into
    if len(options.more) != 1:
        options.refuse(f"wanted RECIPE and OUT, or --into DIR, found {_number(1 + len(options.more), 'name')} and no --into")
    return [options.recipe], options.more[0]


def _merge_many(recipes: Sequence[str | Path], into: str, how: Mapping[str, Any]) -> int:
    from pcb_ray.many import merge_many

    found = merge_many(recipes, into, **how)
    rows = [("merge", "state", "seconds", "read", "")]
    for name, one in found.items():
        told = str(one.failure).splitlines() if one.failure else list(one.receipt.warnings) if one.receipt else []
        note = told[0] if len(told) == 1 else f"{_number(len(told), 'line')} above" if told else ""
        rows.append((name, one.state, f"{one.elapsed_s:.1f}", readable_bytes(one.bytes_read), note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, state, seconds, read, note in rows:
        line = f"{name:{widths[0]}}  {state:{widths[1]}}  {seconds:>{widths[2]}}  {read:>{widths[3]}}  {note}"
        print(line.rstrip() if len(line) <= 160 else f"{line[:157]}...")
    failures = [one.failure for one in found.values() if one.failure is not None]
    print(f"{into}: {len(found) - len(failures)} of {_number(len(found), 'merge')} done")
    return 0 if not failures else 1 if any(isinstance(one, RunError) for one in failures) else 2


def _search(options: argparse.Namespace) -> int:
    from pcb_ray.searching.run import search

    found = search(options.recipe, options.out, max_shard_bytes=options.max_shard_size, **_shared(options))
    from pcb_ray.searching import tables  # and libraries: `search` has told if one is missing

    print(tables.scoreboard(found.request, found.scores).as_text())
    for note in found.notes:
        print(f"note: {note}")
    print(f"{options.out}: the winner of {found.trials} candidates, merged; {options.out}/report.html shows the search")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from pcb_ray.searching.run import sweep

    found = sweep(options.recipe, options.out, **_shared(options))
    from pcb_ray.searching import report, tables

    request, records = found.request, found.records
    print(tables.grid_table(request, records).as_text())
    for note in report.notes_of_sweep(request, records, found.base[request.search_split][request.metric]):
        print(f"note: {note}")
    print(f"{options.out}: {len(found.records)} points; {options.out}/report.html shows them")
    return 0


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    names = ("workers", "address", "memory", "labels", "resources", "resume", "overwrite", "allow_code")
    room = {"cache": options.cache, "scratch": options.scratch, "scratch_bytes": options.scratch_size}
    return {name: getattr(options, name) for name in names} | room


def _verify(options: argparse.Namespace) -> int:
    from pcb_ray.verifying import verify

    found = verify(options.out, method=options.method, sample=options.sample)
    for problem in found.problems:
        print(f"pcb-ray: {problem}", file=sys.stderr)
    if found.ok:
        print(f"{options.out}: all digests match, and the parts recomputed are what the inputs give")
    return 0 if found.ok else 1


def _submit(options: argparse.Namespace) -> int:
    from pcb_ray import submitting

    if options.follow is not None:
        return submitting.follow(submitting.Cluster(options.address), options.follow)
    of_job = options.submitted
    recipes: list[str | Path] = [of_job.recipe] if "recipe" in of_job else []
    out: str | None = of_job.out if "out" in of_job else None
    if options.words[0] == "merge":
        recipes, out = _recipes_and_out(of_job)
    method = of_job.method if "method" in of_job else None
    code = [] if method is None else _files_of_code(method)
    sent = [one for one in recipes if isinstance(one, Path)]  # what lies in a store the job reads there
    package = submitting.gather(sent, options.include, code, allow_code="allow_code" in of_job and of_job.allow_code)
    return submitting.run(options.words, package, out, options.address, wait=not options.no_wait)


def _files_of_code(method: str) -> list[Path]:
    """The file that --method names, if it is one of this machine."""
    return [path for path in (Path(method), Path(method.rpartition(":")[0])) if path.is_file()][:1]
