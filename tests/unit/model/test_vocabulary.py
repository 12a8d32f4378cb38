"""Tokenizer and model must speak of the same ids."""

from burnish.model.vocabulary import TokenizerFacts, check_vocabulary, stop_ids


def test_ids_outside_the_embedding_are_an_error() -> None:
    findings = check_vocabulary(TokenizerFacts(512, None, 2, 0), {}, None, 512)
    assert "ids up to 512" in findings.errors[0]
    assert "set model.tokenizer" in findings.errors[0]
    assert not check_vocabulary(TokenizerFacts(511, None, 2, 0), {}, None, 512).errors


def test_differing_special_ids_only_warn() -> None:
    tokenizer = TokenizerFacts(99, 1, 2, 0)
    findings = check_vocabulary(tokenizer, {"eos_token_id": 3, "bos_token_id": 1}, {"eos_token_id": [2, 3]}, 100)
    assert not findings.errors
    assert findings.warnings == (
        "config.json: eos_token_id=3, but the tokenizer has eos id 2; the export's generation_config stops at both",
    )
    assert "outside the embedding" in check_vocabulary(tokenizer, {"pad_token_id": 100}, None, 100).warnings[0]
    assert "pad and eos are one token" in check_vocabulary(TokenizerFacts(9, None, 2, 2), {}, None, 10).warnings[0]
    assert "no eos token" in check_vocabulary(TokenizerFacts(9, None, None, 0), {}, None, 10).warnings[0]


def test_generation_stops_at_every_stated_id_and_the_tokenizers_own() -> None:
    tokenizer = TokenizerFacts(99, None, 2, 0)
    assert stop_ids(tokenizer, {"eos_token_id": 7}, {"eos_token_id": [5, 6]}) == (5, 6, 2)
    assert stop_ids(tokenizer, {"eos_token_id": 7}, None) == (7, 2)
