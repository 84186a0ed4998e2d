"""The correction of an adapter, its report and its audit."""
