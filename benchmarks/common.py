"""What all benchmarks share: their arguments, where data are, and how results are kept."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time

import numpy as np


def parser(description, learns=True):
    """Arguments that every benchmark takes, or every one that learns from data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="made-up data and few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the result; nothing is kept without it")
    if learns:
        folder = os.environ.get("KERAS_VDROP_DATA")
        parser.add_argument("--data", default=folder, help="folder of data (KERAS_VDROP_DATA)")
        parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
        parser.add_argument("--resume", action="store_true", help="make only the rows that --out does not hold yet")
        parser.add_argument("--jobs", type=int, default=1, help="how many processes share the rows; needs --out")
        parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser


def add_places(parser):
    """Arguments that say where a benchmark runs, for `start_anew`."""
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"], help="in place of KERAS_BACKEND")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="in place of what the backend chooses")


def start_anew(backend, device):
    """Run this command again where the environment asks for another backend or device: both are read on import."""
    import keras

    wanted = {} if backend is None else {"KERAS_BACKEND": backend}
    if device == "cpu":
        wanted.update(CUDA_VISIBLE_DEVICES="-1", JAX_PLATFORMS="cpu")
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if device == "gpu" and not _sees_gpu():
        sys.exit(f"The backend {keras.backend.backend()!r} sees no GPU.")


def _sees_gpu():
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    try:
        return bool(keras.distribution.list_devices("gpu"))
    except RuntimeError:  # what JAX says
        return False


def data_file(folder, *parts):
    """A file below the data folder, or an exit that says what is missing and where to put it."""
    if folder is None:
        sys.exit(
            f"Where are the data? Pass --data DIR with DIR/{'/'.join(parts)}, set KERAS_VDROP_DATA, or use --quick."
        )
    path = pathlib.Path(folder, *parts)
    if not path.is_file():
        sys.exit(f"{path} is missing: put it there, or name another folder by --data.")
    return path


def spread(values):
    """Mean ± standard deviation over the seeds, as text."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.2f}"


def measure(steps, repeats, warm=False):
    """Seconds of every repeat of every step, taken in turn after a warm-up: {name: array}.

    With `warm`, each goes once before every time it is timed, so that what the one before it left in the caches, or its
    threads, do not count.
    """
    for step in steps.values():
        step(), step()
    seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if warm:
                step()
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def learn_rows(networks, options, learn, rows=None):
    """`learn(name, seed)`, a dict, of every network and seed, each kept as soon as it is there.

    Args:
        networks: Names, in the order in which they learn.
        options: Of the command line.
        learn: That function.
        rows: A dict that is to hold the rows as they come, for a network that goes by another's with the same seed.

    Returns:
        Dict from the network's name to the list of its rows, in the order of the seeds.
    """
    whatever = ("data", "out", "resume", "seeds", "jobs", "part", "rows", "models", "backend", "device")
    settings = {key: value for key, value in vars(options).items() if key not in whatever}
    wanted = [(name, seed) for seed in range(options.seeds) for name in networks]
    by_seed = rows is not None
    rows = {} if rows is None else rows
    rows.update({name: [] for name in networks})
    if options.resume:
        for path in [options.out, *_parts(options)]:
            _add_rows(rows, path, settings)
    if options.jobs > 1 and options.part is None:
        _learn_side_by_side(options, rows, settings)
        return rows
    path = options.out
    if options.part is not None:
        path = _part(options, options.part)
        wanted = [each for i, each in enumerate(wanted) if (each[1] if by_seed else i) % options.jobs == options.part]
    for name, seed in wanted:
        if any(row["seed"] == seed for row in rows[name]):
            continue
        begin = time.perf_counter()
        rows[name].append({"seed": seed, **learn(name, seed)})
        print(f"{name}, seed {seed}: {time.perf_counter() - begin:.0f} s {rows[name][-1]}", flush=True)
        keep(path, {"options": settings, "rows": rows})
    if options.part is not None:
        sys.exit()  # the process that asked for them puts them together
    return rows


def _learn_side_by_side(options, rows, settings):
    """The same command in `options.jobs` processes. Each makes some of the rows, and keeps them in a file of its own.

    Whatever stops them, `--resume` finds those files.
    """
    if options.out is None:
        sys.exit("--jobs needs --out, beside which every process keeps its rows.")
    keep(options.out, {"options": settings, "rows": rows})
    for part in _parts(options):
        part.unlink()
    command = [sys.executable, *sys.argv, "--resume"]
    processes = [subprocess.Popen([*command, "--part", str(part)]) for part in range(options.jobs)]
    failed = sum(process.wait() != 0 for process in processes)
    for part in _parts(options):
        _add_rows(rows, part, settings)
    keep(options.out, {"options": settings, "rows": rows})
    for part in _parts(options):
        part.unlink()
    if failed:
        sys.exit(f"{failed} of {options.jobs} processes failed; --resume makes the rows that are missing.")


def _part(options, part):
    return options.out.with_suffix(f".part{part}.json")


def _parts(options):
    """The files of processes that have not been put together."""
    if options.out is None or options.part is not None:
        return []
    return sorted(options.out.parent.glob(f"{options.out.stem}.part*.json"))


def _add_rows(rows, path, settings):
    """Add a file's rows to `rows`, each network's in the order of the seeds."""
    if path is None or not path.is_file():
        return
    kept = json.loads(path.read_text())
    if kept["options"] != settings:
        sys.exit(f"{path} holds rows of other options, {kept['options']}: name another file, or drop --resume.")
    for name, each in kept["rows"].items():
        known = {row["seed"] for row in rows.setdefault(name, [])}
        rows[name] += [row for row in each if row["seed"] not in known]
        rows[name].sort(key=lambda row: row["seed"])


def keep(path, result):
    """Write a result with the command, the versions, the machine and the date."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about(), **result}, indent=1) + "\n")


def about():
    """The command, the versions, the machine, its accelerator and the date."""
    packages = ("keras", "tensorflow", "jax", "torch", "numpy")
    return {
        "backend": sys.modules["keras"].backend.backend() if "keras" in sys.modules else None,
        "command": shlex.join(["python", *_without_places(sys.argv)]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": _accelerator(),
    }


def _processor():
    """Its name, where Linux or Python knows it."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _accelerator():
    """Its name, or None where the backend has none or has not been imported."""
    backend = sys.modules["keras"].backend.backend() if "keras" in sys.modules else None
    if backend == "jax":
        device = sys.modules["jax"].devices()[0]
        return None if device.platform == "cpu" else device.device_kind
    if backend == "tensorflow":
        config = sys.modules["tensorflow"].config
        devices = config.list_physical_devices("GPU")
        return config.experimental.get_device_details(devices[0]).get("device_name") if devices else None
    if backend == "torch" and (cuda := sys.modules["torch"].cuda).is_available():
        return cuda.get_device_name()
    return None


def _without_places(arguments):
    """The command without the places that are those of one machine."""
    places = {"--data": "DIR", "--ood": "FILE", "--plot": "FILE", "--models": "DIR"}
    return [places.get(before, after) for before, after in zip([None, *arguments], arguments)]


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
