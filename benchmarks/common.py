"""Code that all benchmarks share: command-line arguments, data files, and saving of results."""

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


def parser(description, learns=True, seeds=3):
    """Return a parser of the shared arguments.

    `learns` adds those of benchmarks that make rows with `learn_rows`. `seeds` is the default of `--seeds`; None leaves
    that argument out.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use generated data and few steps, to check that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the result; without it, nothing is saved")
    if learns:
        folder = os.environ.get("KERAS_VDROP_DATA")
        parser.add_argument("--data", default=folder, help="folder of data (default: KERAS_VDROP_DATA)")
        if seeds is not None:
            parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, starting at 0")
        parser.add_argument("--resume", action="store_true", help="compute only the rows that are not in --out yet")
        parser.add_argument("--jobs", type=int, default=1, help="number of processes that share the rows; needs --out")
        parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser


def add_places(parser):
    """Add the arguments that select the backend and device, for `start_anew`."""
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"], help="backend, instead of KERAS_BACKEND")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="device, instead of the backend's choice")


def start_anew(backend, device):
    """Restart this command if the environment names another backend or device, since both are read on import.

    Exits with an error if `device` is "gpu" and the backend sees none.
    """
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
    except RuntimeError:  # JAX raises it if it has no GPU
        return False


def data_file(folder, *parts):
    """Return the path of a data file, or exit with a message that says what is missing and where to put it."""
    if folder is None:
        sys.exit(
            f"No data folder is set. Pass --data DIR with DIR/{'/'.join(parts)}, set KERAS_VDROP_DATA, or use --quick."
        )
    path = pathlib.Path(folder, *parts)
    if not path.is_file():
        sys.exit(f"There is no file {path}. Put it there, or pass another folder as --data.")
    return path


def spread(values):
    """Format the mean ± standard deviation of the values of all seeds."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.2f}"


def measure(steps, repeats, warm=False):
    """Time the steps in turn, after a warm-up, and return {name: seconds of every repeat}.

    With `warm`, each step also runs once, untimed, before each timed run, so that the caches and threads of the step
    before it do not affect the time.
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
    """Call `learn(name, seed)` for every network and seed, and save each row as soon as it is made.

    With `options.jobs` > 1, several processes share the rows. With `options.resume`, saved rows are not made again.

    Args:
        networks: Names of the networks, in the order of training.
        options: The command-line options.
        learn: Function from a name and a seed to a row, a dict.
        rows: Dict to fill with the rows, or None for a new one. Pass one if a row uses other networks of the same seed:
            then one process makes all rows of a seed.

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
        sys.exit()  # the parent process merges the rows
    return rows


def _learn_side_by_side(options, rows, settings):
    """Run this command in `options.jobs` processes, each with its own share of the rows and file; merge the files.

    After an interruption, `--resume` reads those files.
    """
    if options.out is None:
        sys.exit("--jobs needs --out: each process saves its rows beside that file.")
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
        sys.exit(f"{failed} of {options.jobs} processes failed. Use --resume to compute the missing rows.")


def _part(options, part):
    return options.out.with_suffix(f".part{part}.json")


def _parts(options):
    """Return the files of processes whose rows are not merged yet."""
    if options.out is None or options.part is not None:
        return []
    return sorted(options.out.parent.glob(f"{options.out.stem}.part*.json"))


def _add_rows(rows, path, settings):
    """Add the rows of a file to `rows`, sorted by seed. Exits if the file holds rows of other options."""
    if path is None or not path.is_file():
        return
    kept = json.loads(path.read_text())
    if kept["options"] != settings:
        sys.exit(f"{path} contains rows of other options: {kept['options']}. Pass another file, or omit --resume.")
    for name, each in kept["rows"].items():
        known = {row["seed"] for row in rows.setdefault(name, [])}
        rows[name] += [row for row in each if row["seed"] not in known]
        rows[name].sort(key=lambda row: row["seed"])


def keep(path, result):
    """Write a result to a JSON file, together with `about()`. Does nothing if `path` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about(), **result}, indent=1) + "\n")


def about():
    """Return the backend, command, package versions, machine, accelerator and date."""
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
    """Return the name of the processor, from Linux or else from Python."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _accelerator():
    """Return the name of the backend's GPU, or None without one, or if no backend has been imported."""
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
    """Return the command line with the paths of this machine replaced by placeholders."""
    places = {"--data": "DIR", "--ood": "FILE", "--plot": "FILE", "--models": "DIR"}
    return [places.get(before, after) for before, after in zip([None, *arguments], arguments)]


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
