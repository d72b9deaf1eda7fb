"""The live page as a person meets it: in Chromium, with few users and with many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: .[dev] has it")
from selenium.webdriver import Chrome  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

from tests.soppu.dashboard import browser, crowd  # noqa: E402
from tests.soppu.dashboard.crowd import Crowd  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why := browser.missing()), reason=why)]
PHONE, DESK = (390, 844), (1280, 800)


@dataclass
class Person:
    """Looks at the pages of a crowd."""

    driver: Chrome
    url: str
    crowd: Crowd

    def see(self, path: str) -> None:
        self.driver.get(self.url + path)

    def click(self, text: str) -> None:
        """A link, and wait until the page is another one."""
        title = self.driver.title
        self.driver.find_element(By.LINK_TEXT, text).click()
        self.until(lambda: self.driver.title != title)

    def until(self, there: Callable[[], Any]) -> Any:
        """What is found in the end; fails when it is not within ten seconds."""
        end = time.monotonic() + 10
        while not (found := there()):
            assert time.monotonic() < end, self.driver.find_element(By.TAG_NAME, "main").text
            time.sleep(0.05)
        return found

    @property
    def heading(self) -> str:
        return str(self.driver.find_element(By.TAG_NAME, "h1").text)

    @property
    def rows(self) -> list[str]:
        """First cells of the rows of users."""
        told = self.driver.execute_script(
            "return [...document.querySelectorAll('#rows tbody tr')].map(one => one.cells[0].textContent)"
        )
        return list(told)

    @property
    def views(self) -> list[str]:
        """A path of every kind."""
        mine, hostile = self.crowd.users[0], self.crowd.users[-1]
        users = [f"/users/{quote(one, safe='')}" for one in (mine, hostile)]
        runs = ["/runs", *(f"/runs/{crowd.run(number)}" for number in (1, 2, 3))]
        search = f"/users?q={quote(crowd.HOSTILE)}"
        return ["/", "/users", search, *users, f"/bundles/{self.crowd.bundle_id}", *runs]


@pytest.fixture(scope="module", params=[10, 1000, 100_000])
def person(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    made = crowd.make(tmp_path_factory.mktemp("crowd"), request.param)
    with browser.dashboard(made.registry, made.runs) as (url, _), browser.chromium() as driver:
        found = Person(driver, url, made)
        found.see("/runs")
        while "being read" in driver.page_source:  # large reports are read beside
            time.sleep(0.5)
            found.see("/runs")
        yield found


@pytest.fixture(autouse=True)
def _calm(person: Person) -> Iterator[None]:
    """A desk's window, and a console that says nothing at the end either."""
    browser.sized(person.driver, *DESK)
    browser.complaints(person.driver)
    yield
    assert browser.complaints(person.driver) == []


def test_from_the_fleet_to_a_user_to_a_version_and_back(person: Person) -> None:
    person.see("/")
    assert person.driver.find_element(By.CSS_SELECTOR, "a.tile b").text == f"{len(person.crowd.users):,}"
    person.click("Users")
    who = "ada.000000@example.com"
    person.click(who)
    assert person.heading.startswith(who) and "personal" in person.driver.page_source
    version = person.driver.find_element(By.CSS_SELECTOR, "td.first a[href^='/adapters/']").text
    person.click(version)
    assert version in person.heading and who in person.driver.page_source
    for title in (who, "Users", "Fleet"):
        person.driver.back()
        person.until(lambda title=title: person.driver.title.startswith(title))


def test_a_search_is_answered_while_it_is_typed_and_can_be_come_back_to(person: Person) -> None:
    person.see("/users")
    last = crowd.user_ids.name_of(person.crowd.users[-2])
    person.driver.find_element(By.ID, "q").send_keys(last)
    person.until(lambda: person.rows == [last])
    person.click(last)
    person.driver.back()
    person.until(lambda: person.rows == [last])
    person.see("/users?q=%25_%25")
    assert person.rows == [] and "Nobody has" in person.driver.page_source


def test_pages_forward_have_everybody_once(person: Person) -> None:
    person.see("/users")
    seen = person.rows
    for _ in range(3):
        if not (more := person.driver.find_elements(By.CSS_SELECTOR, "a.next")):
            assert len(seen) == len(person.crowd.users) <= 50 or len(person.crowd.users) > 200
            break
        more[0].click()
        person.until(lambda before=seen: person.rows and person.rows[0] not in before)
        seen = [*seen, *person.rows]
    names = sorted(person.crowd.users)
    assert seen == [crowd.user_ids.name_of(one) for one in names[: len(seen)]]
    assert len(seen) == min(200, len(names))


def test_hostile_names_and_texts_are_shown_and_run_nothing(person: Person) -> None:
    person.see(f"/users/{quote(person.crowd.users[-1], safe='')}")
    assert crowd.HOSTILE in person.heading
    shown = [one.text for one in person.driver.find_elements(By.TAG_NAME, "pre")]
    assert crowd.HOSTILE_TEXT in shown
    for path in person.views:
        person.see(path)
        assert person.driver.title != "taken" and not person.driver.find_elements(By.TAG_NAME, "img")


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_nothing_is_wider_than_the_window_nor_hard_to_read(
    person: Person, size: tuple[int, int], colours: str
) -> None:
    browser.sized(person.driver, *size)
    browser.scheme(person.driver, colours)
    for path in person.views:
        person.see(path)
        wide, cut, faint = person.driver.execute_script(LOOK)
        assert wide <= size[0] and not cut, path
        assert not faint, path


# How wide the page is, tables that are cut off, and texts of a contrast below 4.5 : 1, as WCAG has it.
LOOK = """
const bright = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = one => {
  for (; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
  return "rgb(255, 255, 255)";
};
const faint = [...document.querySelectorAll("body *")]
  .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
  .filter(one => one.checkVisibility())
  .map(one => {
    const [a, b] = [bright(getComputedStyle(one).color), bright(behind(one))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 200)];
  })
  .filter(([ratio]) => ratio < 4.5);
const cut = [...document.querySelectorAll(".card")].filter(one => one.scrollWidth > one.clientWidth);
return [document.documentElement.scrollWidth, cut.map(one => one.textContent.slice(0, 200)), faint];
"""


def test_the_fleet_follows_a_run_without_being_asked(person: Person) -> None:
    person.see("/")
    flying: Path = person.crowd.runs / crowd.run(3)
    assert "40.0 %" in person.driver.page_source and "round 2 of 3" in person.driver.page_source
    crowd.tell(flying, share=0.7)
    person.until(lambda: "70.0 %" in person.driver.page_source)
    crowd.tell(flying, share=0.4)
