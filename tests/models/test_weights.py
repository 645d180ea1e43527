"""Starting weights from files: what fits is taken, another network is refused, nothing is unpickled."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from scalecv.errors import ConfigError
from scalecv.models import build_model
from scalecv.models.bands import adapt_channels
from scalecv.models.library import library_weights
from scalecv.models.weights import load_state, load_weights


def small(outputs=3, channels=3, weights=None, **extra):
    model = build_model("resnet10", in_channels=channels, outputs=outputs, args={"width": 8}, **extra)
    if weights:
        load_weights(model, weights)
    return model


def saved(model, path):
    save_file(model.state_dict(), str(path))
    return str(path)


def test_same_network_gives_the_same_logits(tmp_path):
    model = small()
    uri = saved(model, tmp_path / "w.safetensors")
    again = small(weights=uri)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_bundle_folder_is_a_place_for_weights(tmp_path):
    saved(small(), tmp_path / "model.safetensors")
    assert load_weights(small(), str(tmp_path)).left == ()


def test_another_head_starts_fresh_and_is_told(tmp_path, caplog):
    uri = saved(small(outputs=3), tmp_path / "w.safetensors")
    caplog.set_level("INFO")
    model = small(outputs=9)
    assert load_weights(model, uri).left == ("fc.weight", "fc.bias")
    assert "fc.weight, fc.bias" in caplog.text


def test_other_bands_take_the_channels_in_turn(tmp_path):
    model = small()
    wide = small(channels=5, weights=saved(model, tmp_path / "w.safetensors"))
    first = model.conv1.weight * (3 / 5)
    assert torch.equal(wide.conv1.weight, first[:, [0, 1, 2, 0, 1]])
    assert torch.equal(wide.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


def test_grey_images_in_equal_channels_keep_their_response():
    weight = torch.randn(4, 3, 3, 3)
    for channels in (1, 2, 3, 6):
        adapted = adapt_channels(weight, channels)
        assert adapted.shape == (4, channels, 3, 3)
        if channels in (3, 6):
            torch.testing.assert_close(adapted.sum(1), weight.sum(1))


def test_a_small_stem_keeps_the_other_weights(tmp_path):
    model = small()
    uri = saved(model, tmp_path / "w.safetensors")
    assert load_weights(small(stem="small"), uri).left == ("conv1.weight",)


def test_a_classifier_starts_the_encoder_of_a_segmenter(tmp_path):
    classifier = build_model("resnet18", in_channels=3, outputs=10)
    uri = saved(classifier, tmp_path / "w.safetensors")
    unet = build_model("unet", in_channels=4, outputs=1)
    load_weights(unet, uri)
    assert torch.equal(unet.encoder.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)


def test_weights_saved_from_a_wrapper_fit():
    model = small()
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert load_state(small(), wrapped, "memory").left == ()


def test_weights_of_another_network_are_refused_with_counts(tmp_path):
    uri = saved(build_model("mobilenet_v3_small", in_channels=3, outputs=3), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"0 of 38 parameters fit by name and shape.*conv1.weight"):
        small(weights=uri)


def test_files_that_are_not_there_or_not_safetensors(tmp_path):
    with pytest.raises(ConfigError, match="there is no"):
        small(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(ConfigError, match="there is no"):
        small(weights="imagenett")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(pickle.dumps({"conv1.weight": 1}))
    with pytest.raises(ConfigError, match="not a safetensors file"):
        small(weights=str(bad))


def test_a_download_that_fails_says_what_to_do():
    def fetch():
        raise OSError("no route to host")

    with pytest.raises(ConfigError, match=r"no route to host.*set model.weights=URI"):
        library_weights("resnet18", fetch)


def test_weights_keep_the_norm_that_is_asked_for(tmp_path):
    model = small()
    model.bn1.running_mean.fill_(0.5)
    uri = saved(model, tmp_path / "w.safetensors")
    assert torch.equal(small(weights=uri, norm="frozen").bn1.running_mean, model.bn1.running_mean)


def test_all_and_encoder_say_what_does_not_fit(tmp_path):
    uri = saved(small(outputs=3), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"=all, but .* for fc.weight, fc.bias \(36 of 38 fit\): .*encoder"):
        load_weights(small(outputs=9), uri, scope="all")
    model = small(outputs=3)
    fresh = model.fc.weight.clone()
    told = load_weights(model, uri, scope="encoder")
    assert told.left == ("fc.weight", "fc.bias") and torch.equal(model.fc.weight, fresh), "fresh, though it would fit"
    assert str(told).endswith("w.safetensors; start fresh: fc.weight, fc.bias; not used: fc.bias, fc.weight")
    with pytest.raises(ConfigError, match=r"weights_scope=encoder, but .* for conv1.weight .*=fitting"):
        load_weights(small(stem="small"), uri, scope="encoder")


def test_the_encoder_of_a_segmenter_serves_another_and_a_classifier(tmp_path):
    unet = build_model("unet", in_channels=4, outputs=5)
    uri = saved(unet, tmp_path / "w.safetensors")
    fpn, classifier = (build_model(arch, in_channels=4, outputs=1) for arch in ("fpn", "resnet18"))
    told = load_weights(fpn, uri, scope="encoder")
    assert {name.partition(".")[0] for name in told.left} == {"decoder", "segmentation_head"}
    assert torch.equal(fpn.encoder.layer4[1].conv2.weight, unet.encoder.layer4[1].conv2.weight)
    assert load_weights(classifier, uri, scope="encoder").left == ("fc.weight", "fc.bias")
    assert torch.equal(classifier.conv1.weight, unet.encoder.conv1.weight)
    with pytest.raises(ConfigError, match="weights_scope=all"):
        load_weights(build_model("resnet18", in_channels=4, outputs=1), uri, scope="all")
    alone = saved(build_model("resnet18", in_channels=4, outputs=1), tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=r"weights_scope=all, but .* decoder"):
        load_weights(build_model("unet", in_channels=4, outputs=1), alone, scope="all")
