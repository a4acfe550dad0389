"""CITATION.cff: what the format asks for, and the paper that the README names."""
import yaml
from helpers import ROOT

AUTHORS = ["Sucheng Ren", "Qihang Yu", "Ju He", "Xiaohui Shen", "Alan Yuille", "Liang-Chieh Chen"]


def test_the_paper_is_cited():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = content["preferred-citation"]
    assert content["cff-version"] == "1.2.0" and content["message"] and content["title"]
    for work in (content, paper):
        assert [f"{author['given-names']} {author['family-names']}" for author in work["authors"]] == AUTHORS
    assert paper["type"] == "conference-paper" and paper["year"] == 2025 and "2412.15205" in paper["url"]
    title = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"] in title.replace("*", "")
    assert content.keys() <= {"cff-version", "message", "type", "title", "authors", "preferred-citation"}
