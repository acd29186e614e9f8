"""Sending a run to a Ray cluster as a job, following its log, and ending as it ended.

The log is asked for again and again, whole, by Ray's own client: what was shown is known by its length, so that no lost connection
can lose a line or show one twice. (Ray's other way, a stream, ends alike when a job ends and when a connection breaks.)"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import ntpath
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from pcb_ray.checks import shown, without_secrets
from pcb_ray.errors import RequestError, RunError
from pcb_ray.files.store import as_path
from pcb_ray.progress import readable_bytes
from pcb_ray.recipe import read_yaml, sources_in
from pcb_ray.user_code import check_below, names_code

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
MOST_BYTES = 10**8  # Ray takes 100 MiB, with what an archive adds
CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

RECONNECT_S = 600.0  # so long a cluster may be out of reach
SUBMIT_S = 120.0  # likewise, before it has taken the job
CONNECT_S, ANSWER_S = 15.0, 60.0
SLOWEST_LINK = 50_000  # bytes a second
POLL_S, LONGEST_POLL_S = 1.0, 60.0
POLL_SHARE = 0.05  # of the time that goes into fetching a log which has grown long

STOPPED, LEFT = 128 + signal.SIGTERM, 128 + signal.SIGINT
"""Exit codes: the job was stopped; this process was, and the job goes on."""

_T = TypeVar("_T")


# ------------------------------------------------------------------------------------------------ what is sent


class Package(NamedTuple):
    """Files that a job gets as its working directory."""

    files: Mapping[str, Path]
    """By path in the job."""
    names: Mapping[Path, str]
    """The paths in the job, by what the user wrote."""

    def zipped(self) -> bytes:
        """The same files give the same bytes, so that Ray keeps them once."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, path in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (path.stat().st_mode & 0o777) << 16
                archive.writestr(entry, path.read_bytes())
        return stream.getvalue()


def gather(
    recipes: Sequence[Path], include: Sequence[Path] = (), code: Sequence[Path] = (), *, allow_code: bool = False
) -> Package:
    """The recipes, with all that they name by paths relative to their folders and that is a file; Python files that the command
    names, with what they import from beside them; and what else is to be included. Their places to each other stay. Folders are
    included with all files below them.

    Raises RequestError with all that can't be sent: models, files that aren't there, code outside of a recipe's folder unless
    `allow_code`, more than Ray takes."""
    problems: list[str] = []
    found: dict[Path, None] = {}
    for recipe in recipes:
        found |= dict.fromkeys(_named_by(recipe, allow_code, problems))
    for file in code:
        found |= dict.fromkeys(_with_imports([file], file.parent))
    for path in include:
        inside = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        found |= dict.fromkeys(inside)
        if not inside:
            problems.append(f"--include {path}: wanted a file, or a folder with files, found none. Fix: check the path.")
    paths = list(dict.fromkeys(Path(os.path.abspath(path)) for path in found))
    problems += [
        f"{path}: wanted files that belong to a recipe, found one with the suffix of a model's, which is never sent. "
        "Fix: put it where the cluster sees it, and name it by its absolute path there."
        for path in paths
        if path.suffix in CHECKPOINTS
    ]
    if problems:
        raise RequestError(problems)
    sizes = {path: path.stat().st_size for path in paths}
    if (total := sum(sizes.values())) >= MOST_BYTES:
        largest = sorted(paths, key=lambda path: -sizes[path])[:5]
        raise RequestError(
            f"what the recipe names: wanted less than {readable_bytes(MOST_BYTES)} to send, about Ray's limit, found "
            f"{readable_bytes(total)}: {', '.join(f'{path} ({readable_bytes(sizes[path])})' for path in largest)}. "
            "Fix: put the largest where the cluster sees them, and name them by their absolute paths there."
        )
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    in_job = {path: path.relative_to(root).as_posix() for path in paths}
    if odd := [name for name in in_job.values() if not name.isprintable() or "\\" in name or ntpath.splitdrive(name)[0]]:
        raise RequestError(
            f"{shown(odd[0])}: wanted a name that Ray unpacks on every system, found one with a backslash, a drive or "
            "a character that can't be seen. Fix: rename it."
        )
    named = {path: in_job[Path(os.path.abspath(path))] for path in (*recipes, *code)}
    return Package({name: path for path, name in in_job.items()}, named)


def _named_by(recipe: Path, allow_code: bool, problems: list[str]) -> Iterator[Path]:
    """The recipe and the files that it names."""
    try:
        if not recipe.is_file():  # a pipe would be waited for
            raise FileNotFoundError(2, "no regular file is there")
        text = recipe.read_text(encoding="utf-8")
        mapping = read_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        problems.append(f"recipe {shown(str(recipe))}: wanted a YAML file, found that {reason}. Fix: name the YAML file.")
        return
    except RequestError as error:
        problems += error.problems
        return
    yield recipe
    if without_secrets(text) != text:
        problems.append(
            f"recipe {shown(str(recipe))}: wanted none, found what looks like a secret (a token, or a password in an address), "
            "which would lie on the cluster. Fix: remove it, and give it to the nodes by their environment."
        )
    if not isinstance(mapping, Mapping):
        return  # the job tells what is wrong
    folder = recipe.absolute().parent
    for place, source in sources_in(mapping).items():
        if _is_relative(source) and (_exists(folder / source) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[^\s@]+)?", source)):
            problems.append(
                f"{place}: wanted a model that the cluster can open, found the relative path {shown(source)}: models are never "
                "sent. Fix: name it by an absolute path that all nodes see, a URI, or a Hub id."
            )
    search = mapping.get("search")
    evaluator = search.get("evaluator") if isinstance(search, Mapping) else None
    named = dict(evaluator) if isinstance(evaluator, Mapping) else {evaluator: None}
    grid = mapping.get("grid")
    of_grid = grid.get("method") if isinstance(grid, Mapping) else None
    files: list[Path] = []
    for method in (mapping.get("merge_method"), *(of_grid if isinstance(of_grid, list | tuple) else ())):
        files += _code(method, "merge_method", folder, allow_code, problems)
    for name, options in named.items():
        files += _code(name, "search.evaluator", folder, allow_code, problems)
        files += _data(options, folder)
    yield from _with_imports(files, folder)


def _code(name: object, place: str, folder: Path, allow_code: bool, problems: list[str]) -> list[Path]:
    """The files that `file.py:object` or `module:object` names, if they lie beside the recipe."""
    if not names_code(name):
        return []
    source = name.rpartition(":")[0]
    if not source.endswith(".py"):
        return _module(source.partition(".")[0], folder)
    if not _is_relative(source):
        return []
    if not _exists(folder / source):
        problems.append(
            f"{place}: wanted a file, found none at {folder / source}. Fix: check the path; it is relative to the recipe."
        )
        return []
    if not allow_code:
        try:
            check_below(source, folder, place)
        except RequestError as error:
            problems += error.problems
    return [folder / source]


def _data(options: object, folder: Path) -> Iterator[Path]:
    """The files that an evaluator's options name, also within a command; of folders only that of lm_eval's tasks."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            if key == "include_path" and isinstance(value, str) and _is_relative(value):
                yield from sorted(
                    path for path in (folder / value).rglob("*") if path.is_file() and "__pycache__" not in path.parts
                )
            yield from _data(value, folder)
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _data(value, folder)
    elif isinstance(options, str):
        try:
            words = shlex.split(options)
        except ValueError:  # a quote without its other one
            words = options.split()
        for word in dict.fromkeys([options, *words, *(word.partition("=")[2] for word in words)]):
            if _is_relative(word) and (folder / word).is_file():
                yield folder / word


def _with_imports(files: Sequence[Path], folder: Path) -> list[Path]:
    """The files, and those beside them or beside the recipe that their Python imports."""
    found: dict[Path, None] = {}
    left = list(files)
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = None
        if path.suffix == ".py":
            for name in _imported_by(path):
                left += [other for place in {folder, path.parent} for other in _module(name, place)]
    return list(found)


def _imported_by(path: Path) -> set[str]:
    """The first parts of the names of all modules that a file of Python imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the job tells
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - {"pcb_ray"}  # that of the cluster


def _module(name: str, folder: Path) -> list[Path]:
    """The Python files of a module that lies in this folder."""
    file, package = folder / f"{name}.py", folder / name
    return [file] if file.is_file() else sorted(path for path in package.rglob("*.py") if path.is_file())


def _is_relative(name: str) -> bool:
    return bool(name) and not name.startswith(("/", "~")) and "://" not in name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a character that no name has
        return False


def command_line(words: Sequence[str], names: Mapping[Path, str], out: object = None) -> str:
    """What the job's shell is to run: `pcb-ray` with these words, recipes by their names in the job.

    Raises RequestError for an OUT that would be lost with the job, and for a secret, which the job's details and log would show."""
    for word in words:
        if without_secrets(word) != word:
            raise RequestError(
                f"{without_secrets(word)}: wanted no secret in it, since the job's details and log show the command, found one. "
                "Fix: remove it, and give it to the nodes by their environment."
            )
    typed = next((word for word in words if out is not None and Path(word) == Path(str(out))), "/")
    if not os.path.isabs(typed) and "://" not in typed:
        raise RequestError(
            f"{typed}: wanted an absolute path, found a relative one, which would lie in the job's temporary folder and be lost. "
            "Fix: give an absolute path on storage that the cluster sees and that lasts."
        )
    in_job = {path: f"./{name}" if name.startswith("-") else name for path, name in names.items()}

    def there(word: str) -> str:
        if (path := Path(as_path(word))) in in_job:
            return in_job[path]
        option, equals, value = word.rpartition("=")  # --method=FILE:NAME
        file, colon, name = value.partition(":")
        return f"{option}{equals}{in_job[Path(file)]}{colon}{name}" if Path(file) in in_job else word

    return shlex.join(["pcb-ray", *map(there, words)])


# ------------------------------------------------------------------------------------------------ the cluster


class _Answer(Exception):
    """The dashboard answered, but not with what was asked for."""

    def __init__(self, status: int, text: str) -> None:
        last = (text.strip().splitlines() or [""])[-1].strip()
        super().__init__(f"HTTP {status}" if not last or last.startswith("<") else f"HTTP {status}: {without_secrets(last)[:200]}")
        self.status, self.text = status, text


_FAILURES = (OSError, ValueError, TypeError, KeyError, RuntimeError, _Answer)
"""What Ray's client raises where it doesn't get an answer that it knows: of requests (OSError), JSON and pydantic (ValueError)."""


class UnknownJob(RequestError):
    """It is not on this cluster, or not any more."""


class Cluster:
    """A cluster by its dashboard's address. Whatever fails is told in our own words: those of a library may quote the token."""

    def __init__(self, address: str | None) -> None:
        """Raises RequestError where there is no dashboard, or it refuses the token; RunError where nothing answers."""
        self.url = _url(address)
        self.shown = without_secrets(self.url)
        # The variables would silently win over the address.
        for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(variable, None)
        try:
            self._client = _client_class()(self.url, headers=_headers())
        except RequestError:
            raise
        except _FAILURES as error:
            if (reason := _reason(error)) is not None:
                raise RunError(
                    f"--address {self.shown}: wanted a Ray dashboard, found that nothing answers there ({reason}). Fix: check the "
                    "address; a dashboard listens on 127.0.0.1 of the head unless `ray start --head --dashboard-host=...` says "
                    "otherwise: an SSH tunnel reaches it (ssh -L 8265:127.0.0.1:8265 HEAD)."
                ) from None
            raise RequestError(
                f"--address {self.shown}: wanted a Ray dashboard, found something else that answers ({_told(error)}). "
                "Fix: give the address that `ray start --head` prints for the dashboard, such as http://HEAD:8265."
            ) from None

    def ask(self, question: Callable[[Any], _T], limit_s: float = RECONNECT_S) -> _T:
        """The answer of Ray's client, asked again while the connection or the server is gone, up to `limit_s` seconds.

        Raises RunError after that, and UnknownJob if the cluster doesn't know the job."""
        start, failures = time.monotonic(), 0
        while True:
            try:
                answer = question(self._client)
            except RequestError:
                raise
            except _FAILURES as error:
                if isinstance(error, _Answer) and error.status == 404 and "does not exist" in error.text:
                    raise UnknownJob(
                        f"{self.shown}: wanted the job, found a cluster that doesn't know it (a head that was started anew has "
                        "forgotten its jobs). Fix: check the id with `ray job list`, or submit the same with --resume."
                    ) from None
                reason = _reason(error) or _told(error)
                if time.monotonic() - start > limit_s:
                    raise RunError(
                        f"{self.shown}: wanted an answer within {limit_s:.0f} s, found none ({reason}). Fix: look after the head "
                        "and the network; a job goes on without us, and `pcb-ray submit --follow JOB` shows it."
                    ) from None
                if not failures:
                    say(f"lost the connection to {self.shown} ({reason}); trying for {limit_s:.0f} s to get it back")
                failures += 1
                time.sleep(min(2.0**failures / 2, 10.0))
                continue
            if failures:
                say(f"connected to {self.shown} again")
            return answer

    def submit(self, job: str, entrypoint: str, package: bytes | None) -> None:
        """Start the job, once, whatever becomes of the connection meanwhile. Raises RunError if the cluster refuses it."""
        with contextlib.ExitStack() as stack:
            environment: dict[str, Any] = {}
            if package is not None:
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="pcb-ray-", suffix=".zip"))
                file.write(package)
                file.flush()
                environment = {"working_dir": file.name}

            def send(client: Any) -> None:
                try:
                    # No CPU is asked for: the driver runs on the head, also where nothing else may.
                    client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment)
                except _Answer as refusal:
                    if "already exists" not in refusal.text:  # after an answer that was lost
                        raise

            self.ask(send, SUBMIT_S)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, _Answer) else f"{type(error).__name__}"


def say(text: str) -> None:
    print(f"pcb-ray: {text}", file=sys.stderr, flush=True)


def _url(address: str | None) -> str:
    """The address of the dashboard: as given, or by Ray's variables, or that of this machine (and of a tunnel)."""
    where, url = "--address", address
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if url is None and os.environ.get(variable):
            where, url = variable, os.environ[variable]
    url = DEFAULT_ADDRESS if url is None else url
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        ok = False
    if not ok:
        raise RequestError(
            f"{where}: wanted the address of the cluster's dashboard, found {shown(url)}. Fix: give --address http://HEAD:8265 "
            "(jobs go by the dashboard's port, not by that of `ray start`)."
        )
    return url.rstrip("/")


def _headers() -> dict[str, str] | None:
    """What RAY_JOB_HEADERS asks to send along, as for `ray job submit`."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if text is None:
        return None
    try:
        headers = json.loads(text)
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise RequestError('RAY_JOB_HEADERS: wanted a JSON object of texts, found something else. Fix: write {"Name": "value"}.')
    return headers


def _client_class() -> Any:
    """Ray's client of jobs, with limits of time, and errors that can be told apart. Raises RequestError where it isn't whole."""
    try:
        import aiohttp  # noqa: F401
        import pydantic  # noqa: F401
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise RequestError(
            f"pcb-ray submit: wanted Ray with what its jobs need, found that {error.name} is not installed here. "
            "Fix: pip install 'ray[default]'."
        ) from None
    logging.getLogger("ray.dashboard").propagate = False  # it tells of uploads

    class Client(JobSubmissionClient):
        def __init__(self, address: str, headers: dict[str, Any] | None) -> None:
            try:
                super().__init__(address, headers=headers)
            except AuthenticationError:
                _refused(address, found="no token here")

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            to_send_s = len(options.get("data") or b"") / SLOWEST_LINK
            try:
                answer = super()._do_request(method, endpoint, timeout=(CONNECT_S + to_send_s, ANSWER_S), **options)
            except requests.exceptions.InvalidHeader:  # it quotes the token
                _refused(self._address, "one here that is not one line of plain text")
            except AuthenticationError as error:
                _refused(self._address, "another one here" if "failed" in str(error).partition(":")[0] else "none sent")
            if endpoint == "/api/version" and answer.status_code >= 400:
                raise _Answer(answer.status_code, answer.text)
            return answer

        def _raise_error(self, answer: Any) -> NoReturn:
            raise _Answer(answer.status_code, answer.text)

    return Client


def _refused(address: str, found: str) -> NoReturn:
    raise RequestError(
        f"{without_secrets(address)}: wanted the cluster's token, found {found}. Fix: copy ~/.ray/auth_token from the head to the "
        "same place here, and set RAY_AUTH_MODE=token."
    ) from None


def _reason(error: BaseException) -> str | None:
    """Why there was no answer, of an error of the connection; None for another error."""
    import requests

    seen: list[BaseException] = []
    left: list[Any] = [error]
    while left:
        one = left.pop(0)
        if not isinstance(one, BaseException) or one in seen:
            continue
        seen.append(one)
        left += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
    for one in seen:
        if isinstance(one, requests.exceptions.Timeout | TimeoutError):
            return "no answer in time"
    for one in seen:
        if isinstance(one, OSError) and one.errno is not None and one.strerror:
            return one.strerror
    lost = (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)
    return "the connection broke" if any(isinstance(one, lost) for one in seen) else None


# ------------------------------------------------------------------------------------------------ a job and its log


class _Terminated(KeyboardInterrupt):
    """SIGTERM: nobody is to be asked."""


def run(words: Sequence[str], package: Package, out: object, address: str | None, wait: bool) -> int:
    """Run `pcb-ray` with these words as a job that gets the package, and follow it; the job's exit code, or 0 once it is submitted
    without `wait`.

    Raises RequestError and RunError before there is a job, or when it is lost."""
    entrypoint = command_line(words, package.names, out)
    job = f"pcb-ray-{words[0]}-{secrets.token_hex(4)}"
    try:
        cluster = Cluster(address)
        data = package.zipped() if package.files else None
        if data is not None:
            names = sorted(package.files)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            say(f"sending {readable_bytes(len(data))} to {cluster.shown}: {', '.join(names[:8])}{more}")
        say(f"submitting job {job}")
        cluster.submit(job, entrypoint, data)
    except KeyboardInterrupt:
        say(f"interrupted; if `ray job list` shows {job}, `ray job stop {job}` ends it")
        return LEFT
    if not wait:
        say(f"`{_follow_line(cluster, job)}` shows its log and ends as it ends")
        print(job, flush=True)
        return 0
    return follow(cluster, job)


def follow(cluster: Cluster, job: str) -> int:
    """Show the job's log from its start until it has ended; its exit code: 143 if it was stopped, 128 and the number of the signal
    that killed its driver, 130 if Ctrl-C or SIGTERM ends this process and leaves the job running."""
    log = _Log(cluster, job)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as in a script's background
                signal.signal(number, log.interrupt)
        while True:
            try:
                return _ended(log.until_the_end())
            except _Terminated:
                choice = "l"
            except KeyboardInterrupt:
                choice = _ask(job)
            if choice == "s":
                say(f"stopping {job}")
                with contextlib.suppress(KeyboardInterrupt):  # it is asked again
                    cluster.ask(lambda client: client.stop_job(job))
            if choice == "l":
                say(f"{job} goes on. `{_follow_line(cluster, job)}` follows it again;")
                say(f"`ray job stop --address {cluster.shown} {job}` stops it")
                return LEFT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """What a job has printed, shown once each line."""

    def __init__(self, cluster: Cluster, job: str) -> None:
        self._cluster, self._job = cluster, job
        self._shown = 0
        """Characters; -1 if the log can't be had."""
        self._known = False
        self._is_showing = False
        self._missed: KeyboardInterrupt | None = None

    def interrupt(self, number: int, _frame: object) -> None:
        """For signals: raises KeyboardInterrupt, but not between what is shown and what is known to be."""
        error = _Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if not self._is_showing:
            raise error
        self._missed = error

    def until_the_end(self) -> Any:
        """Ray's details of the job, once it has ended and all that it printed is shown."""
        while True:
            try:
                details = self._cluster.ask(lambda client: client.get_job_info(self._job))
            except UnknownJob as gone:
                if self._known:
                    raise RunError(str(gone)) from None
                raise
            self._known = True
            if details.submission_id is None:
                raise RequestError(
                    f"{self._job}: wanted a submitted job, found a driver of another kind, whose log Ray doesn't keep. Fix: "
                    "give the id that `pcb-ray submit` told, or `ray job list` shows as `submission_id`."
                )
            has_ended = details.status.is_terminal()  # asked before the log, so that the log then is whole
            start = time.monotonic()
            try:
                self._show(self._cluster.ask(self._text, 30.0 if has_ended else RECONNECT_S), has_ended)
            except RunError:
                if not has_ended:
                    raise
                say("the end of the log can't be had any more")
            if has_ended:
                return details
            time.sleep(min(max(POLL_S, (time.monotonic() - start) / POLL_SHARE), LONGEST_POLL_S))

    def _text(self, client: Any) -> str:
        try:
            return str(client.get_job_logs(self._job))
        except _Answer as answer:
            if "UnicodeDecodeError" not in answer.text:
                raise
            if self._shown >= 0:
                say(
                    "the log holds bytes that are no text, and Ray can't hand it on; it lies on the head, and the job is waited for"
                )
                self._shown = -1
            return ""

    def _show(self, text: str, has_ended: bool) -> None:
        """Whole lines only, until there will be no more."""
        stop = len(text) if has_ended else text.rfind("\n") + 1
        if self._shown < 0 or stop <= self._shown:
            return
        self._is_showing = True
        try:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text[self._shown : stop].encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()
            self._shown = stop
        finally:
            self._is_showing = False
        if self._missed is not None:
            missed, self._missed = self._missed, None
            raise missed


def _ended(details: Any) -> int:
    """The exit code of a job that has ended, after words on whatever its log doesn't tell."""
    job, code = details.submission_id, details.driver_exit_code
    if details.status == "STOPPED":
        say(f"{job} was stopped; --resume goes on with a merge or search, and until then nothing is under the output's name")
        return STOPPED
    if details.status == "SUCCEEDED":
        return 0
    if code is None:
        lines = [line.strip() for line in without_secrets(str(details.message or "")).splitlines() if line.strip()]
        what = (lines[0] if len(lines) < 2 else f"{lines[0]} ... {lines[-1]}")[:600] if lines else "and tells no reason"
        raise RunError(
            f"{job}: wanted it to run to its end, found that Ray ended it: {what}. Fix: look after the head's node (`ray status`, "
            "its memory and disk), and submit the same with --resume."
        )
    if code < 0:  # of a signal; a shell in between gives the other form
        code = 128 - code
    if code - 128 in set(signal.Signals) - {signal.SIGINT}:
        say(f"{job}: its driver was ended by {signal.Signals(code - 128).name}; --resume goes on with a merge or search")
    elif code == 127:
        say(
            f"{job}: wanted the command pcb-ray on the cluster's head, found none (exit code 127). Fix: install pcb-ray on all "
            "nodes, and run `ray start` where its environment is activated: jobs get their PATH from there."
        )
    else:
        say(f"{job} ended with exit code {code}")
    return int(code)


def _ask(job: str) -> str:
    """What is to become of a job after Ctrl-C: s (stop it), l (leave it) or f (follow it on)."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "l"
    try:
        while True:
            print(f"\npcb-ray: stop {job}, leave it running, or follow it on? [s/l/f] ", end="", file=sys.stderr, flush=True)
            answer = sys.stdin.readline()
            if not answer:
                return "l"
            if (choice := answer.strip().lower()[:1]) in ("s", "l", "f"):
                return choice
    except KeyboardInterrupt:
        return "l"


def _follow_line(cluster: Cluster, job: str) -> str:
    return f"pcb-ray submit --follow {job} --address {shlex.quote(cluster.shown)}"
