package download

// CheckRedirect is the default client's rule.
var CheckRedirect = checkRedirect
