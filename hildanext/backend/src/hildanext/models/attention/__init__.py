"""The rule `hildanext.masks.may_attend` as it is executed."""
