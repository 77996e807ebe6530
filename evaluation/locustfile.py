"""The load test's mix for Locust, which spreads the generation over machines: pip install '.[load]'

    locust -f evaluation/locustfile.py --headless -H http://127.0.0.1:8000 -u 20 -r 5 -t 60s
    locust -f evaluation/locustfile.py --master ...      and --worker on the others

A user sends an edit every `--every` seconds, later where an answer takes longer: a closed loop with
a ceiling. `edsc load` is the open one. A 429 is listed by its kind and counts as a failure.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
from locust import HttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from evaluation.arrivals import Mix, check_target, read_photos
from gateway.answer import Quality
from shared.errors import InvalidRequest

SAMPLES: Final = Path(__file__).resolve().parent.parent / "samples"


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--photos", default=str(SAMPLES), help="a folder of photographs")
    parser.add_argument("--quality", default="fast", choices=[q.value for q in Quality])
    parser.add_argument("--every", type=float, default=1.0, help="seconds between a user's edits")
    parser.add_argument("--no-align", action="store_true", help="the pictures are aligned faces")
    parser.add_argument("--allow-host", default="", help="a host that is not this machine")
    parser.add_argument("--api-key", default="", env_var="EDSC_API_KEY", help="bearer token")


@events.test_start.add_listener
def _check(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    allowed = (options.allow_host,) if options.allow_host else ()
    try:
        check_target(environment.host or "", allowed)
    except InvalidRequest as error:
        print(error)
        environment.process_exit_code = 2
        if environment.runner is not None:
            environment.runner.quit()


class Editor(HttpUser):
    """Somebody who asks for one edit after another, drawn from the mix."""

    def wait_time(self) -> float:
        """Seconds until the next edit: what is left of `--every`."""
        every: float = self.environment.parsed_options.every
        return max(0.0, every - self._took_s)

    def on_start(self) -> None:
        """Read the photographs; every user draws from a seed of its own."""
        options = self.environment.parsed_options
        self._took_s = 0.0
        self._mix = Mix(
            read_photos(Path(options.photos)),
            qualities=(Quality(options.quality),),
            align=not options.no_align,
        )
        self._random = np.random.default_rng()
        if options.api_key:
            self.client.headers["authorization"] = f"Bearer {options.api_key}"

    @task
    def edit(self) -> None:
        """One edit; listed by its quality."""
        job = self._mix.draw(self._random)
        with self.client.post(
            "/v1/edits",
            name=f"edit, {job.order.quality.value}",
            files={"image": (job.photo.name, job.photo.data)},
            data=job.form(),
            catch_response=True,
        ) as answer:
            if answer.status_code != 200:
                try:
                    kind = str(answer.json()["type"]).rpartition(":")[2]
                except (ValueError, KeyError, TypeError):
                    kind = "no problem+json"
                answer.failure(f"{answer.status_code} {kind}")
            self._took_s = answer.elapsed.total_seconds() if answer.elapsed else 0.0
