package policy_test

import (
	"fmt"
	"net/netip"
	"testing"

	"push.rocks/smartvm/network/policy"
)

func TestPublic(t *testing.T) {
	for text, want := range map[string]bool{
		"1.1.1.1": true, "172.15.255.255": true, "172.32.0.0": true, "100.63.0.1": true, "168.63.129.15": true,
		"2606:4700::1111": true, "2a00::1": true,
		"64:ff9b::101:101": true, "2002:101:101::1": true,

		"10.1.2.3": false, "172.16.0.1": false, "172.31.0.2": false, "192.168.1.1": false, "100.64.0.1": false,
		"100.100.100.200": false, "127.0.0.53": false,
		"169.254.169.254": false, "168.63.129.16": false, "192.0.0.192": false, "198.18.0.1": false, "224.0.0.1": false,
		"240.0.0.1": false, "255.255.255.255": false, "0.0.0.0": false,
		"::": false, "::1": false, "::ffff:1.1.1.1": false, "fe80::1": false, "fd00::1": false, "fec0::1": false,
		"ff02::1": false, "fd00:ec2::254": false,
		"64:ff9b::a9fe:a9fe": false, "64:ff9b::a00:1": false, "2002:a9fe:a9fe::": false, "2002:c0a8:101::1": false,
		"64:ff9b:1::1": false,
	} {
		if got := policy.Public(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: got %v, want %v", text, got, want)
		}
	}
}

func TestEmbedding(t *testing.T) {
	for text, want := range map[string]string{
		"169.254.0.0/16": "[64:ff9b::a9fe:0/112 2002:a9fe::/32]", "10.0.0.0/8": "[64:ff9b::a00:0/104 2002:a00::/24]",
		"192.0.2.1/32": "[64:ff9b::c000:201/128 2002:c000:201::/48]",
		"fd00::/8":     "[]",
	} {
		if got := fmt.Sprint(policy.Embedding(netip.MustParsePrefix(text))); got != want {
			t.Errorf("%s: got %v, want %v", text, got, want)
		}
	}
}
