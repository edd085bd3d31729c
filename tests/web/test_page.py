"""What the page's reader sees, and what the workers say about it."""

from __future__ import annotations

import re
import time

import pytest
from conftest import GATEWAYS, LONG, TIMEOUT, Demo, open_page
from playwright.sync_api import Page, expect

MODES = ("presence", "plain")
with_each_gateway = pytest.mark.parametrize("gateway", GATEWAYS, indirect=True)
QUICK = "?pause=25"
"""Streams of 3 s, for tests that wait for their end."""


def ask(page: Page, count: int = 3, transport: str = "sse", mode: str = "presence", worker: str = "any") -> None:
    page.select_option("select[name=count]", str(count))
    page.select_option("select[name=worker]", worker)
    page.check(f"input[value={transport}]")
    page.check(f"input[value={mode}]")
    page.click("button.primary")


def wait_for_words(page: Page, count: int = 3, words: int = 3) -> None:
    """Waits until so many streams have so many words."""
    page.wait_for_function(
        "([count, words]) => [...document.querySelectorAll('.stream[data-state=open] .words')]"
        ".filter((box) => box.children.length >= words).length >= count",
        arg=[count, words],
    )


@with_each_gateway
@pytest.mark.parametrize(("transport", "mode"), [("sse", "presence"), ("ws", "presence"), ("ws", "plain")])
def test_streams_arrive_complete(page: Page, demo: Demo, transport: str, mode: str) -> None:
    open_page(page, demo, QUICK)
    sent = demo.total("sent", mode)
    ask(page, 3, transport, mode)
    for card in page.locator(".stream").all():
        expect(card.locator(".status")).to_contain_text("All 120 messages arrived.", timeout=60_000)
        expect(card.locator(".words span")).to_have_count(120)
    demo.wait("all messages are counted", lambda: demo.total("sent", mode) == sent + 360)


@with_each_gateway
@pytest.mark.parametrize(("transport", "worker"), [("sse", "c"), ("ws", "go"), ("sse", "python")])
def test_leaving_one_stream_stops_its_worker_only(page: Page, demo: Demo, transport: str, worker: str) -> None:
    saved = demo.total("not_computed")
    ask(page, 3, transport, worker=worker)
    wait_for_words(page)
    page.get_by_role("button", name="Leave stream 2").click()
    demo.wait("one stream has stopped", lambda: demo.total("running") == 2)
    demo.wait("its messages are counted as saved", lambda: demo.total("not_computed") > saved + 50)
    expect(page.locator("#log li").first).to_contain_text(re.compile(r"Stream 2: its client left, and the worker in"))
    wait_for_words(page, 2, 10)
    page.get_by_role("button", name="Leave all").click()
    demo.wait("all streams have stopped", lambda: demo.total("running") == 0)


@with_each_gateway
@pytest.mark.parametrize("close", ["button", "tab"])
@pytest.mark.parametrize("transport", ["sse", "ws"])
def test_closing_a_tab_stops_its_workers(page: Page, demo: Demo, transport: str, close: str) -> None:
    saved = demo.total("not_computed")
    page.check(f"input[value={transport}]")
    with page.context.expect_page() as opening:
        page.get_by_role("button", name="Open a tab").click()
    wait_for_words(opening.value)
    demo.wait("three streams run", lambda: demo.total("running") == 3)
    if close == "button":
        page.get_by_role("button", name="Close the tab").click()
    else:
        opening.value.close()
    demo.wait("the workers have stopped", lambda: demo.total("running") == 0)
    demo.wait("their messages are counted as saved", lambda: demo.total("not_computed") > saved + 150)


@with_each_gateway
def test_killing_the_gateway_stops_its_workers(page: Page, demo: Demo) -> None:
    ask(page, 3)
    ask(page, 3, "ws")
    wait_for_words(page, 6)
    pid = demo.pid("gateway")
    page.locator("#kill-gateway").click()
    expect(page.locator(".stream .status").first).to_contain_text("the connection to the gateway is lost")
    demo.wait("the workers have stopped", lambda: demo.total("running") == 0)
    expect(page.locator("#log")).to_contain_text(re.compile("The gateway was killed: the workers of 6 streams stopped"))
    assert demo.pid("gateway") != pid
    page.wait_for_selector("[data-ready=true]")
    ask(page, 1, "ws")
    wait_for_words(page, 1)


@with_each_gateway
def test_freezing_the_gateway_stops_its_workers(page: Page, demo: Demo) -> None:
    ask(page, 3)
    wait_for_words(page)
    page.get_by_role("button", name="Freeze").click()
    demo.wait("the workers have stopped", lambda: demo.total("running") == 0)
    expect(page.locator("#log")).to_contain_text("The gateway was frozen: the workers of 3 streams stopped within")
    page.get_by_role("button", name="Thaw").click()
    expect(page.locator(".stream .status").first).to_contain_text("Failed after")
    ask(page, 1)
    wait_for_words(page, 1)


def test_a_killed_worker_is_noticed_and_started_again(page: Page, demo: Demo) -> None:
    ask(page, 3, worker="go")
    wait_for_words(page)
    pid = demo.pid("presence Go")
    page.get_by_role("button", name="Kill the worker in Go").click()
    expect(page.locator("#log")).to_contain_text(
        re.compile("The worker in Go was killed: the gateway knew of 3 streams")
    )
    for card in page.locator(".stream").all():
        expect(card).to_have_attribute("data-state", "failed")
    assert demo.pid("presence Go") != pid
    ask(page, 1, worker="go")
    wait_for_words(page, 1)


@pytest.mark.parametrize(
    ("gateway", "mode"), [*((name, "presence") for name in GATEWAYS), ("go", "plain")], indirect=["gateway"]
)
def test_streams_outlive_a_restart_of_nats_server_only_with_presence(page: Page, demo: Demo, mode: str) -> None:
    demo.wait("no other streams run", lambda: demo.total("running", "plain") == 0)
    open_page(page, demo, "?length=200&pause=40")
    ask(page, 3, "ws", mode)
    wait_for_words(page)
    pid = demo.pid("nats-server")
    page.get_by_role("button", name="Restart").click()
    complete, broken = (3, 0) if mode == "presence" else (0, 3)
    expect(page.locator("#log")).to_contain_text(
        f"Of 3 streams that ran when nats-server was killed, {complete} arrived complete,"
        f" 0 were left by their clients, {broken} broke.",
        timeout=60_000,
    )
    expect(page.locator(".stream[data-state=complete]")).to_have_count(complete)
    assert demo.pid("nats-server") != pid


def test_the_same_load_costs_less_with_presence(page: Page, demo: Demo) -> None:
    open_page(page, demo, QUICK)
    page.check("input[value=ws]")
    for mode, name in zip(MODES, ["nats-presence", "plain NATS"]):
        page.get_by_role("button", name=f"Run it with {name}").click()
        expect(page.locator("#load-status")).to_have_text(f"Done with {name}.", timeout=60_000)
        assert demo.total("computed", mode) >= 24 * 30
    assert demo.total("wasted", "presence") < 24 * 5
    assert demo.total("wasted", "plain") > 24 * 60
    assert demo.total("cpu_us", "presence") < demo.total("cpu_us", "plain")
    expect(page.locator("#verdict")).to_contain_text("times as much")
    expect(page.locator("#comparison tr").first).to_contain_text("2,880")


def test_the_page_says_so_when_the_demo_has_ended(browser: object, page: Page) -> None:
    own = Demo("go")
    other = page.context.new_page()
    other.goto(own.url)
    other.wait_for_selector("[data-ready=true]")
    pids = [process["pid"] for process in own.state()["processes"]]
    own.end()
    expect(other.locator("#lost")).to_be_visible()
    assert not [pid for pid in pids if is_alive(pid)]
    other.close()


def test_nothing_is_left_when_the_demo_is_killed() -> None:
    own = Demo("go")
    own.do("freeze-gateway")
    pids = [process["pid"] for process in own.state()["processes"]]
    own.process.kill()
    own.process.wait()
    deadline = time.monotonic() + TIMEOUT
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing(page: Page, demo: Demo, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 900})
    ask(page, 3, mode="plain", transport="ws")
    ask(page, 3)
    wait_for_words(page, 6)
    page.get_by_role("button", name="Leave stream 4").click()
    page.locator("#log li").first.wait_for()
    check_with_axe(page)
    page.goto(f"{demo.url}/tab.html{LONG}&transport=sse&mode=presence&worker=any&prompt=light")
    wait_for_words(page)
    check_with_axe(page)


def check_with_axe(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page)
    serious = [v for v in results.response["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def test_everything_can_be_reached_by_keyboard(page: Page, demo: Demo) -> None:
    page.focus("input[name=prompt]")
    page.keyboard.press("Enter")
    wait_for_words(page)
    page.get_by_role("button", name="Leave stream 3").focus()
    page.keyboard.press("Space")
    demo.wait("the stream has stopped", lambda: demo.total("running") == 2)
    assert page.evaluate("document.activeElement.className") == "words"
