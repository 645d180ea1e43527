"""WebDataset over tar shards, simplejpeg and OpenCV; from S3 through curl and presigned addresses."""

from tests.reference.feeds.work import Decode, Epochs, Work

FORMATS = ("tar",)


def open_feed(work: Work) -> Epochs:
    import webdataset as wds

    names = work.names("tar", "*.tar")
    if work.store:
        urls = [f"pipe:curl -s -f '{address}'" for address in _presigned(work, names)]
    else:
        urls = [f"{work.place('tar')}/{name}" for name in names]
    shards = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000)
    samples = shards.to_tuple("jpg", "__key__").map_tuple(Decode(), int).batched(work.batch)
    loader = wds.WebLoader(samples, batch_size=None, num_workers=work.workers, persistent_workers=True)
    return lambda epoch: iter(loader)


def _presigned(work: Work, names: list[str]) -> list[str]:
    import boto3

    assert work.store
    keys = {"aws_access_key_id": work.store.key, "aws_secret_access_key": work.store.secret}
    client = boto3.client("s3", endpoint_url=work.store.endpoint, region_name="us-east-1", **keys)
    wanted = [{"Bucket": work.store.bucket, "Key": f"tar/{name}"} for name in names]
    return [client.generate_presigned_url("get_object", Params=one, ExpiresIn=7200) for one in wanted]
