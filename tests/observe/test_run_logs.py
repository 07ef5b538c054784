"""Logs go to the file of their role, on one line, without secrets."""

import logging
from pathlib import Path
from typing import Any

import pytest

from rlorch.observe.logs import REDACTED, RunLogs, is_secret, redact, redact_text, secret_values

log = logging.getLogger("rlorch.some.part")


def lines(run_dir: Path, role: str) -> list[str]:
    return (run_dir / "logs" / f"{role}.log").read_text().splitlines()


def test_a_record_is_one_line_with_time_role_level_message_and_fields(tmp_path: Path) -> None:
    with RunLogs(tmp_path, "trainer", terminal=False, environ={}):
        log.info("loss is %s\nand more", "fine", extra={"step": 12, "replica": "sampler 0"})
        log.debug("too much detail")
    (line,) = lines(tmp_path, "trainer")
    assert line.startswith("time=20")
    assert 'level=info role=trainer msg="loss is fine\\nand more" step=12 replica="sampler 0"' in line
    assert line.endswith("logger=rlorch.some.part")


def test_a_record_may_name_the_role_it_belongs_to(tmp_path: Path) -> None:
    with RunLogs(tmp_path, "coordinator", terminal=False, environ={}):
        log.info("mine")
        log.info("its", extra={"role": "sampler-0"})
        log.info("escape", extra={"role": "../../x"})
    assert "msg=mine" in lines(tmp_path, "coordinator")[0]
    assert "role=sampler-0 msg=its" in lines(tmp_path, "sampler-0")[0]
    assert {path.parent for path in tmp_path.rglob("*.log")} == {tmp_path / "logs"}


def test_a_traceback_stays_on_the_line_of_its_record(tmp_path: Path) -> None:
    with RunLogs(tmp_path, "trainer", terminal=False, environ={}):
        try:
            raise ValueError("token=abcdefgh")
        except ValueError:
            log.exception("failed")
    (line,) = lines(tmp_path, "trainer")
    assert 'trace="Traceback' in line
    assert "abcdefgh" not in line


def test_the_terminal_gets_warnings_and_worse_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLogs(tmp_path, "coordinator", environ={"HF_TOKEN": "hf_very_secret"}):
        log.info("progress")
        log.warning("slow with hf_very_secret")
        logging.getLogger("httpx").info("request")
    assert capsys.readouterr().err == f"warning: slow with {REDACTED}\n"
    assert len(lines(tmp_path, "coordinator")) == 2


def test_closing_takes_everything_off_again(tmp_path: Path) -> None:
    root, handlers, level = logging.getLogger(), list(logging.getLogger().handlers), logging.getLogger("rlorch").level
    logs = RunLogs(tmp_path, "trainer", environ={})
    logs.close()
    logs.close()
    log.info("after")
    assert root.handlers == handlers
    assert logging.getLogger("rlorch").level == level
    assert list((tmp_path / "logs").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "openai_api_key",
        "apiKey",
        "AWS_SECRET_ACCESS_KEY",
        "db_password",
        "key",
        "token",
        "client_secret",
        "Authorization",
        "api_keys",
        "accessToken",
        "API-KEY",
    ],
)
def test_names_that_look_secret_are_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokenizer",
        "micro_batch_tokens",
        "stop_token_ids",
        "eos_token",
        "num_loss_tokens",
        "keys",
        "keyboard",
        "monkey",
        "learning_rate",
        "",
        "keep_anchors",
        "key_metric",
    ],
)
def test_ordinary_names_are_not_secret(name: str) -> None:
    assert not is_secret(name)


def test_a_config_is_redacted_at_every_depth_and_otherwise_unchanged() -> None:
    config = {
        "name": "run", "max_tokens": 8, "wandb": {"api_key": "abc", "mode": "offline"}, "url": "http://me:pw@host/x",
        "terms": [{"plugin": "judge", "options": {"token": "t", "use_secret": True, "password": None}}],
    }  # fmt: skip
    assert redact(config) == {
        "name": "run", "max_tokens": 8, "wandb": {"api_key": REDACTED, "mode": "offline"},
        "url": f"http://me:{REDACTED}@host/x",
        "terms": [{"plugin": "judge", "options": {"token": REDACTED, "use_secret": True, "password": None}}],
    }  # fmt: skip
    assert config["wandb"] == {"api_key": "abc", "mode": "offline"}


@pytest.mark.parametrize(
    "text",
    [
        "api_key=S3CRET99 next",
        'header "Authorization: Bearer S3CRET99"',
        '{"api_key": "S3CRET99"}',
        "password: S3CRET99",
        "https://user:S3CRET99@host",
        "--hf-token=S3CRET99",
        "x-api-key: 'S3CRET99'",
        "saw S3CRET99 here",
    ],
)
def test_secrets_leave_free_text(text: str) -> None:
    clean = redact_text(text, secret_values({"MY_TOKEN": "S3CRET99"}) if text.startswith("saw") else ())
    assert "S3CRET99" not in clean
    assert REDACTED in clean


def test_a_secret_inside_quotes_does_not_survive_the_quoting_of_the_line(tmp_path: Path) -> None:
    with RunLogs(tmp_path, "trainer", terminal=False, environ={"MY_SECRET": 'pass"word'}):
        log.warning('api_key="S3CRET99" and pass"word', extra={"api_key": "S3CRET99", "note": "token=S3CRET99"})
    (line,) = lines(tmp_path, "trainer")
    assert "S3CRET99" not in line
    assert "word" not in line


def test_short_values_and_ordinary_variables_are_not_treated_as_secrets() -> None:
    assert secret_values({"A_KEY": "1", "PATH": "/usr/bin:/bin", "B_TOKEN": "long enough"}) == ("long enough",)


def test_what_a_library_puts_on_every_record_is_not_in_the_line(tmp_path: Path) -> None:
    factory = logging.getLogRecordFactory()

    def stamping(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        record.library_stamp = 1
        return record

    logging.setLogRecordFactory(stamping)
    try:
        with RunLogs(tmp_path, "trainer", terminal=False):
            logging.getLogger("rlorch.some.part").info("hello", extra={"step": 3})
    finally:
        logging.setLogRecordFactory(factory)
    line = (tmp_path / "logs" / "trainer.log").read_text()
    assert "step=3" in line
    assert "library_stamp" not in line
