"""Files of weights that several ranks write and load."""


def test_weights_of_a_sharded_model_load_into_a_plain_and_a_sharded_model(results):
    for result in results("weights_of_a_sharded_model"):
        assert result == {"types": ["Tensor"], "plain": True, "sharded": True}


def test_weights_load_from_checkpoints_of_a_sharded_model(results):
    for result in results("weights_from_checkpoints"):
        assert result == {"sharded": (True, True), "full": (True, True)}


def test_weights_that_cannot_be_loaded_or_saved_on_one_rank_are_an_error_on_every_rank(results):
    first, second = results("weights_that_cannot_be_loaded_or_saved")
    assert "missing.pt does not exist" in first["missing"]
    assert "rank 1" in first["missing"]
    assert "missing.pt does not exist" in second["missing"]
    assert second["no folder"].startswith(("OSError", "FileExistsError", "NotADirectoryError"))
    assert "rank 0" in second["no folder"]
    assert "was written for another model than this FSDPLinear" in second["another model"]


def test_under_ddp_rank_zero_alone_writes_weights(results):
    for files in results("files_of_weights_under_ddp"):
        assert files == ["by-0.pt"]
