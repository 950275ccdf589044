"""Files as the benchmarks of social bias have them, of harmless sentences."""

import json

BBQ = {
    "example_id": 0, "category": "Age", "question_polarity": "neg", "context_condition": "ambig", "label": 2,
    "context": "A boy and a man came.", "question": "Who was late?", "ans0": "The boy", "ans1": "The man",
    "ans2": "Not known", "additional_metadata": {"stereotyped_groups": ["old"]},
    "answer_info": {"ans0": ["The boy", "nonOld"], "ans1": ["The man", "old"], "ans2": ["Not known", "unknown"]},
}  # fmt: skip


def write(folder):
    """A tiny file of every format."""
    (folder / "crows.csv").write_text(
        ",sent_more,sent_less,stereo_antistereo,bias_type,annotations\n"
        '0,"Cats, they say, sleep.","Dogs, they say, sleep.",stereo,pets,[]\n'
        "1,Blue wins.,Red wins.,antistereo,colours,[]\n"
    )
    sentences = [
        {"sentence": f"{x} run.", "gold_label": label}
        for x, label in (("Dogs", "stereotype"), ("Cats", "anti-stereotype"), ("Spoons", "unrelated"))
    ]
    row = {"id": "1", "bias_type": "pets", "target": "dog", "context": "They run.", "sentences": sentences}
    (folder / "stereo.json").write_text(
        json.dumps({"version": "1", "data": {"intrasentence": [row], "intersentence": [row]}})
    )
    (folder / "templates.tsv").write_text(
        "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
        "baker\tguest\t0\tThe $OCCUPATION told the $PARTICIPANT that "
        '$NOM_PRONOUN had sold $POSS_PRONOUN "best" bread.\n'
    )
    (folder / "pro_stereotyped_type1.txt.dev").write_text("1 [The baker] met the guest because [he] was early.\n")
    (folder / "anti_stereotyped_type1.txt.dev").write_text("1 [The baker] met the guest because [she] was early.\n")
    other = BBQ | {"question_polarity": "nonneg", "context_condition": "disambig"}
    unusable = BBQ | {"additional_metadata": {"stereotyped_groups": ["tall"]}}
    (folder / "bbq.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (BBQ, other, unusable)))
