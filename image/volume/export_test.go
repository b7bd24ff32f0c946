package volume

var BuildNamed = buildNamed
