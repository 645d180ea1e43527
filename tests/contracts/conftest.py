from tests.small import fields, fields_dataset, shapes, shapes_dataset

__all__ = ["fields", "fields_dataset", "shapes", "shapes_dataset"]
